"""The step times that others measured, next to what the planner computes for their programs.

The programs are not ours: how they compute a layer is described here (`MEGATRON`, `NANOTRON`),
everything else is the planner's. For each table at most one scalar is taken from a row, which the
table then omits. No other constant is fitted on it, but for `Device.call`, the host's time for an
operation, which is fitted on vTrain's rows of one process a layer can hide behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.topology import Layout
from tools.published.comparison import Compared, Reference, Row, Table, rows_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.planner.devices import Device, Link, listed
from trainer.planner.operations import Kernels
from trainer.planner.step_time import Job, stage_costs, step_time

# Megatron-LM of 2021: softmax, bias-gelu and bias-dropout-add are fused, attention is not.
MEGATRON = Kernels(scores_written=True, dropout=True, hidden_passes=10.5, ffn_passes=2, head_passes=11, calls=(60, 90))
# nanotron's Llama: flash attention; norms, rotary embedding, gate and loss one operation each.
NANOTRON = Kernels(scores_written=False, dropout=False, hidden_passes=14, ffn_passes=5, head_passes=16, calls=(60, 90))


@dataclass(frozen=True)
class Measured:
    """A published step: what it was, its seconds, and the job. `flops`: of the model, over all
    GPUs and seconds."""

    what: str
    seconds: float
    job: Job

    def on(self, device: Device) -> Compared:
        job, config = self.job, self.job.network
        layout = f"tp {job.layout.tp} pp {job.layout.pp} dp {job.layout.dp} micro {job.micro_sequences}"
        sequences = job.micro_sequences * job.num_micro_batches * job.layout.dp
        shape = f"h {config.hidden_size} layers {config.num_layers} heads {config.num_heads} tokens {job.seq_len}"
        return Compared(
            what=self.what or f"{shape} sequences {sequences} {layout}",
            published=self.seconds,
            ours=step_time(job, device).total,
            work=self.flops / job.layout.world_size,
            sweep=f"{shape} sequences {sequences} on {job.layout.world_size} {device.name}",
        )

    @property
    def flops(self) -> float:
        config, job = self.job.network, self.job
        per_token = 72 * config.num_layers * config.hidden_size**2
        per_token *= 1 + job.seq_len / (6 * config.hidden_size)
        per_token += 6 * config.hidden_size * config.vocab_size
        return per_token * job.seq_len * job.micro_sequences * job.num_micro_batches * job.layout.dp


def gpt(hidden: int, layers: int, heads: int, length: int, symbols: int) -> TransformerConfig:
    keys = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": length, "vocab_size": symbols}
    return from_hf("gpt2", keys)


def selene(folder: Path) -> Iterator[Compared]:
    """Yield Narayanan et al. 2021 (arXiv:2104.04473), table 1: full recomputation."""
    for row in rows_of(folder, "megatron_sc21_table1"):
        heads, vpp, mbs = (int(row[key]) for key in ("attention_heads", "virtual_pipeline_size", "micro_batch_seqs"))
        job = _job(row, heads=heads, micro=mbs, length=2048, symbols=51200, virtual=vpp, recompute="full")
        yield Measured(row["model"], float(row["derived_iter_time_s"]), job).on(A100_80)


def korthikanti(folder: Path) -> Iterator[Compared]:
    """Yield Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5: full recomputation, and
    sequence parallelism with selective recomputation."""
    for row in rows_of(folder, "korthikanti_table3_5_iteration_time"):
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
        yield Measured(what, float(row["iteration_time_s"]), job).on(A100_80)


def korthikanti_layer(folder: Path) -> Iterator[Compared]:
    """Yield ibid., table 4: forward and backward of a layer of the 22B model [ms]."""
    for row in rows_of(folder, "korthikanti_table4_layer_time"):
        name = row["experiment"]
        recompute = "selective" if "Selective" in name else "full" if "with recompute" in name else "none"
        shape = {"hidden_size": "6144", "layers": "3", "tp": "8", "pp": "3", "dp": "1", "global_batch_seqs": "4"}
        divides = "Sequence" in name
        job = _job(shape, heads=64, micro=4, length=2048, symbols=51200, recompute=recompute, divides_tokens=divides)
        middle = stage_costs(job, A100_80)[1]  # one layer, with neither embedding nor head
        for part, ours in (("forward", middle.forward), ("backward", middle.input_grad + middle.weight_grad)):
            yield Compared(what=f"{name}, {part}", published=float(row[f"{part}_ms"]), ours=1e3 * ours)


def vtrain(folder: Path) -> Iterator[Compared]:
    """Yield a third of vTrain's layouts on one node (Bang et al. 2023, arXiv:2312.12391)."""
    for row in rows_of(folder, "vtrain_single_node_third"):
        length, micro = int(row["seq_len"]), int(row["micro_batch_seqs"])
        job = _job(row, heads=int(row["heads"]), micro=micro, length=length, symbols=50257, recompute="full")
        yield Measured("", float(row["iteration_time_ms"]) / 1e3, job).on(A100_40)


NEEDED = ("hidden_size", "layers", "heads", "dp", "tp", "pp", "micro_batch", "global_batch", "sec_per_iter")


def bigscience(folder: Path) -> Iterator[Compared]:
    """Yield the BLOOM team's steps on A100s whose model and layout are known whole."""
    for row in rows_of(folder, "bigscience_megatron_deepspeed"):
        if "A100-80" not in row["gpu"] or not all(row[key] for key in NEEDED) or not _number(row["sec_per_iter"]):
            continue
        heads, gpus = int(row["heads"]), int(row["gpus"])
        if int(row["dp"]) * int(row["tp"]) * int(row["pp"]) != gpus or int(row["hidden_size"]) % heads:
            continue
        batch = {**row, "global_batch_seqs": row["global_batch"]}
        job = _job(
            batch, heads=heads, micro=int(row["micro_batch"]), length=2048, symbols=250880, recompute="full", zero_stage=1
        )
        yield Measured(f"line {row['line']}", float(row["sec_per_iter"]), job).on(JEAN_ZAY)


def nanotron(folder: Path) -> Iterator[Compared]:
    """Yield nanotron's Llama of 1B parameters on nodes of eight H100."""
    for row in rows_of(folder, "nanotron_old_bench"):
        if not row["iteration_time_ms"]:
            continue
        keys = {"hidden_size": int(row["hidden_size"]), "intermediate_size": int(row["intermediate_size"])}
        keys |= {"num_hidden_layers": int(row["layers"]), "num_attention_heads": int(row["heads"])}
        network = from_hf("llama", {**keys, "vocab_size": 50272, "max_position_embeddings": int(row["seq_len"])})
        job = _job(
            {**row, "hidden_size": "2048"},
            heads=32,
            micro=int(row["micro_batch"]),
            length=int(row["seq_len"]),
            symbols=50272,
            divides_tokens=True,
            zero_stage=1,
        )
        job = replace(job, network=network, kernels=NANOTRON, dtype="bf16", gradient_bytes=4)
        yield Measured("", float(row["iteration_time_ms"]) / 1e3, job).on(H100)


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


A100_40, A100_80, H100 = (listed(name) for name in ("a100-40g", "a100-80g", "h100-80g"))
# The nodes of Jean Zay share four Omni-Path ports of 100 Gbit/s among eight GPUs, and these runs
# hung without CUDA_LAUNCH_BLOCKING=1 (train/tr11-176B-ml/chronicles-prequel.md of the source).
JEAN_ZAY = replace(A100_80, outside=Link(rate=6.25e9, latency=25e-6, share=0.85), asynchronous=False)

# One scalar for each cluster and its software, from one row.
SELENE, LINE_948 = Reference(selene, "1.7B"), Reference(bigscience, "line 948")
KORTHIKANTI = Reference(korthikanti, "22B, full recompute, no SP, 8 GPUs")
OF_KORTHIKANTI = "{scalar:.3f} of Korthikanti's 22B"

TABLES = (
    Table(title="SC'21, table 1", what="step [s]", rows=selene, fitted="{scalar:.3f} of 1.7B", reference=SELENE),
    Table(title="Korthikanti, tables 3 and 5", what="step [s]", rows=korthikanti, fitted=OF_KORTHIKANTI, reference=KORTHIKANTI),
    Table(
        title="Korthikanti, table 4", what="a layer [ms]", rows=korthikanti_layer, fitted=OF_KORTHIKANTI, reference=KORTHIKANTI
    ),
    Table(title="vTrain, one node", what="step [s]", rows=vtrain, fitted="`Device.call`"),
    Table(
        title="BigScience, A100",
        what="step [s]",
        rows=bigscience,
        fitted="{scalar:.3f} of line 948, BLOOM's own layout",
        reference=LINE_948,
    ),
    Table(
        title="nanotron, H100",
        what="step [s]",
        rows=nanotron,
        fitted="{scalar:.3f} of the fastest on eight GPUs",
        reference=Reference(nanotron, "h 2048 layers 24 heads 32 tokens 4096 sequences 1024 tp 2 pp 1 dp 4 micro 8"),
    ),
)
