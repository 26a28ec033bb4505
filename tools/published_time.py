"""The step times that others measured, next to what the planner computes for their programs.

    python -m tools.published_time

The programs are not ours: how they compute a layer is described here (`MEGATRON`), everything else
is the planner's. For each table one scalar is taken from its first row, which the table then omits:
no other constant is fitted on it, but for `Device.call`, the host's time for an operation, which is
fitted on vTrain's rows of one process a layer can hide behind. "constant rate" is the null model:
each row at the mean rate of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import correlation, mean

from parallel.topology import Layout
from tools.published_memory import Row, rows_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.planner.devices import Device, Link, listed
from trainer.planner.operations import Kernels
from trainer.planner.step_time import Job, step_time

# Megatron-LM of 2021: softmax, bias-gelu and bias-dropout-add are fused, attention is not.
MEGATRON = Kernels(scores_written=True, dropout=True, hidden_passes=10.5, ffn_passes=2, head_passes=11, calls=(60, 90))
# The nodes of Jean Zay share four Omni-Path ports of 100 Gbit/s among eight GPUs.
BLOOM = "line 948"  # of the layout that BLOOM was trained in
OMNI_PATH = Link(rate=6.25e9, latency=25e-6, share=0.85)


@dataclass(frozen=True)
class Measured:
    """A published step: what it was, its seconds, and the job. `flops`: of the model, over all
    GPUs and seconds."""

    what: str
    seconds: float
    job: Job
    gpus: int

    def computed(self, on: Device) -> float:
        return step_time(self.job, on).total

    @property
    def flops(self) -> float:
        config, job = self.job.network, self.job
        per_token = 72 * config.num_layers * config.hidden_size**2
        per_token *= 1 + job.seq_len / (6 * config.hidden_size)
        per_token += 6 * config.hidden_size * config.vocab_size
        return per_token * job.seq_len * job.micro_sequences * job.num_micro_batches * job.layout.dp


@dataclass(frozen=True)
class Accuracy:
    """The errors over a table's rows, as shares: of the planner with one scalar, and of the null
    model. `rank`: Spearman's correlation of computed and measured times."""

    table: str
    rows: int
    scalar: float
    mean: float
    largest: float
    signed: float
    rank: float
    null_mean: float

    def __str__(self) -> str:
        """Return the row of the guide's table."""
        errors = f"{self.mean:.1%} | {self.largest:.1%} | {self.signed:+.1%}"
        return f"| {self.table} | {self.rows} | {self.scalar:.3f} | {errors} | {self.rank:.2f} | {self.null_mean:.1%} |"


def gpt(hidden: int, layers: int, heads: int, length: int, symbols: int) -> TransformerConfig:
    keys = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": length, "vocab_size": symbols}
    return from_hf("gpt2", keys)


def selene() -> Iterator[Measured]:
    """Yield Narayanan et al. 2021 (arXiv:2104.04473), table 1: full recomputation."""
    for row in rows_of("megatron_sc21_table1"):
        heads, vpp, mbs = (int(row[key]) for key in ("attention_heads", "virtual_pipeline_size", "micro_batch_seqs"))
        job = _job(row, heads=heads, micro=mbs, length=2048, symbols=51200, virtual=vpp, recompute="full")
        yield Measured(row["model"], float(row["derived_iter_time_s"]), job, int(row["gpus"]))


def korthikanti() -> Iterator[Measured]:
    """Yield Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5: full recomputation, and
    sequence parallelism with selective recomputation."""
    for row in rows_of("korthikanti_table3_5_iteration_time"):
        divides = "sequence parallel" in row["mode"]
        job = _job(
            row,
            heads=int(row["heads"]),
            micro=int(row["micro_batch_seqs"]),
            length=2048,
            symbols=51200,
            virtual=int(row["vpp"]),
            recompute="selective" if divides else "full",
            divides_tokens=divides,
        )
        what = f"{row['model']}, {row['mode']}, {row['gpus']} GPUs"
        yield Measured(what, float(row["iteration_time_s"]), job, int(row["gpus"]))


def vtrain() -> Iterator[Measured]:
    """Yield a third of vTrain's layouts on one node (Bang et al. 2023, arXiv:2312.12391)."""
    for number, row in enumerate(rows_of("vtrain_single_node_third")):
        length, micro = int(row["seq_len"]), int(row["micro_batch_seqs"])
        job = _job(row, heads=int(row["heads"]), micro=micro, length=length, symbols=50257, recompute="full")
        yield Measured(str(number), float(row["iteration_time_ms"]) / 1e3, job, int(row["gpus"]))


NEEDED = ("hidden_size", "layers", "heads", "dp", "tp", "pp", "micro_batch", "global_batch", "sec_per_iter")


def bigscience() -> Iterator[Measured]:
    """Yield the BLOOM team's steps on A100s whose model and layout are known whole."""
    for row in rows_of("bigscience_megatron_deepspeed"):
        if "A100-80" not in row["gpu"] or not all(row[key] for key in NEEDED) or not _number(row["sec_per_iter"]):
            continue
        heads, gpus = int(row["heads"]), int(row["gpus"])
        if int(row["dp"]) * int(row["tp"]) * int(row["pp"]) != gpus or int(row["hidden_size"]) % heads:
            continue
        batch = {**row, "global_batch_seqs": row["global_batch"]}
        job = _job(
            batch, heads=heads, micro=int(row["micro_batch"]), length=2048, symbols=250880, recompute="full", zero_stage=1
        )
        yield Measured(f"line {row['line']}", float(row["sec_per_iter"]), job, gpus)


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _job(row: Row, *, heads: int, micro: int, length: int, symbols: int, virtual: int = 1, **keys: object) -> Job:
    tp, pp, dp, batch = (int(row[key]) for key in ("tp", "pp", "dp", "global_batch_seqs"))
    return Job(
        network=gpt(int(row["hidden_size"]), int(row["layers"]), heads, length, symbols),
        layout=Layout(tp=tp, pp=pp, dp=dp),
        kernels=MEGATRON,
        dtype="fp16",
        seq_len=length,
        micro_sequences=micro,
        num_micro_batches=max(1, batch // (dp * micro)),
        virtual_stages=virtual,
        schedule="interleaved_1f1b" if virtual > 1 else "1f1b",
        gradient_bytes=2,
        **keys,  # type: ignore[arg-type]
    )


# For each table its rows, the machine, and the row that gives the scalar; "" for none.
TABLES: dict[str, tuple[Callable[[], Iterator[Measured]], Device, str]] = {
    "SC'21, table 1": (selene, listed("a100-80g"), "1.7B"),
    "Korthikanti, tables 3 and 5": (korthikanti, listed("a100-80g"), "22B, full recompute, no SP, 8 GPUs"),
    "vTrain, one node": (vtrain, listed("a100-40g"), ""),
    "BigScience, A100": (bigscience, replace(listed("a100-80g"), outside=OMNI_PATH), BLOOM),
}


def accuracy(table: str) -> Accuracy:
    """Return how well the planner's times are those of a table, without the row that gives the
    scalar."""
    rows_in, on, reference = TABLES[table]
    found = {row.what: row for row in rows_in()}
    scalar = found[reference].seconds / found[reference].computed(on) if reference else 1.0
    rows = [row for what, row in found.items() if what != reference]
    computed = [scalar * row.computed(on) for row in rows]
    errors = [ours / row.seconds - 1 for ours, row in zip(computed, rows, strict=True)]
    rates = [row.flops / (row.gpus * row.seconds) for row in rows]
    null = [rate * (len(rates) - 1) / (sum(rates) - rate) - 1 for rate in rates]
    return Accuracy(
        table,
        len(rows),
        scalar,
        mean(map(abs, errors)),
        max(map(abs, errors)),
        mean(errors),
        correlation(_ranks(computed), _ranks([row.seconds for row in rows])),
        mean(map(abs, null)),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for rank, index in enumerate(order):
        ranks[index] = float(rank)
    return ranks


def main() -> int:
    sys.stdout.write("| table | rows | scalar | mean error | largest | signed | rank | constant rate |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for table in TABLES:
        sys.stdout.write(f"{accuracy(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
