"""The memory that others measured or computed, next to what the planner's formulas give for their
programs.

The programs are not ours: which tensors they keep is described here, and only what does not depend
on the program (schedules, a GPU's context, NCCL, the allocator) is the planner's own. No constant
is fitted on the rows of BigScience; two are on nanotron's, see `Nanotron`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.published.comparison import Compared, Row, Table, rows_of
from trainer.planner.in_flight import Kept, by_name
from trainer.planner.memory import CONTEXT_BYTES, GROUP_BYTES, PAIR_BYTES, RESERVE

GIB, MIB = 1 << 30, 1 << 20

# -------------------------------------------------------------------------------- ZeRO, table 1


def zero_states(params: float, data: int, stage: int) -> float:
    """Return the bytes of model states on a device, with fp16 weights and gradients of 2 bytes each
    and 12 of Adam and master weights (Rajbhandari et al. 2020, arXiv:1910.02054, §5)."""
    parts = [2, 2, 12]  # weights, gradients, states: stage 1 divides the last, stage 3 all
    return params * sum(size / (data if stage >= 3 - place else 1) for place, size in enumerate(parts))


def zero_table(folder: Path) -> Iterator[Compared]:
    params = {"7.5B": 7.5, "128B": 128.0, "1T": 1000.0}
    for row in rows_of(folder, "zero_table1_model_states"):
        stage = int(row["stage"].rstrip(")")[-1])
        ours = zero_states(params[row["model"]], int(row["dp"]), stage)
        yield Compared(
            what=f"{row['model']} dp {row['dp']} stage {stage}",
            published=float(row["model_state_gb_per_device"]),
            ours=ours,
            work=params[row["model"]] / int(row["dp"]),
        )


def agrees_as_printed(compared: Compared, printed: str) -> bool:
    """Return whether ours is the printed number, rounded or cut to its digits."""
    digits = len(printed.partition(".")[2])
    cut = math.floor(compared.ours * 10**digits) / 10**digits
    return abs(compared.published - cut) < 1e-9 or abs(compared.published - compared.ours) <= 0.5 * 10**-digits + 1e-9


# ---------------------------------------------------------------- Korthikanti et al. 2022


@dataclass(frozen=True)
class Megatron:
    """A model of Korthikanti et al. 2022 (arXiv:2205.05198, table 3), with the layout of its runs.

    `state_bytes`: weights and gradients in half, and fp32 gradients, masters and moments.
    """

    hidden: int
    layers: int
    heads: int
    pipeline: int
    chunks: int
    sequences: int
    length: int = 2048
    tensor: int = 8
    state_bytes: int = 18

    def of_layer(self, technique: str) -> float:
        """Return the bytes that a layer keeps of a micro-batch (ibid., table 2)."""
        hidden = self.length * self.sequences * self.hidden
        scores = 5 * self.heads * self.length / self.hidden
        t = self.tensor
        return (
            hidden
            * {
                "tensor": 10 + 24 / t + scores / t,
                "sequence": (34 + scores) / t,
                "selective": 10 + 24 / t,
                "sequence + selective": 34 / t,
                "full": 2,
            }[technique]
        )

    def first_stage(self, technique: str) -> float:
        """Return the bytes of activations on the first rank, its micro-batches in flight counted by
        the planner."""
        per_chunk = self.layers // (self.pipeline * self.chunks)
        if self.pipeline == 1:
            return self.of_layer(technique) * self.layers
        in_flight = by_name(
            "interleaved_1f1b" if self.chunks > 1 else "1f1b",
            ranks=self.pipeline,
            virtual_stages=self.chunks,
            num_micro_batches=64 * self.pipeline,
            rank=0,
            of_stage={stage: Kept(1) for stage in range(0, self.pipeline * self.chunks, self.pipeline)},
        )
        return self.of_layer(technique) * per_chunk * sum(in_flight.whole.values())

    @property
    def params(self) -> float:
        """The parameters of a rank's layers: the paper leaves the embedding out."""
        return self.layers * 12 * self.hidden**2 / (self.pipeline * self.tensor)

    @property
    def states(self) -> float:
        return self.state_bytes * self.params


MEGATRON = {
    "22B": Megatron(6144, 48, 64, pipeline=1, chunks=1, sequences=4),
    "175B": Megatron(12288, 96, 96, pipeline=8, chunks=3, sequences=1),
    "530B": Megatron(20480, 105, 128, pipeline=35, chunks=3, sequences=1),
    "1T": Megatron(25600, 128, 160, pipeline=64, chunks=1, sequences=1),
}
TECHNIQUES = {
    "none (TP only)": "tensor",
    "TP only, no recompute": "tensor",
    "sequence parallel": "sequence",
    "selective": "selective",
    "sequence parallel + selective": "sequence + selective",
    "full recompute": "full",
}


def korthikanti_ratios(folder: Path) -> Iterator[Compared]:
    """Yield activations as a share of those with tensor parallelism alone [%]."""
    for row in rows_of(folder, "korthikanti_memory"):
        if row["unit"] == "%" and row["technique"] in TECHNIQUES:
            model, technique = MEGATRON[row["model"]], TECHNIQUES[row["technique"]]
            ours = 100 * model.of_layer(technique) / model.of_layer("tensor")
            yield Compared(what=f"{row['model']} {technique}", published=float(row["value"]), ours=ours)


def korthikanti_bytes(folder: Path) -> Iterator[Compared]:
    """Yield activations of the first stage, and model states [GiB]."""
    for row in rows_of(folder, "korthikanti_memory"):
        if row["unit"] != "GiB":
            continue
        model, technique = MEGATRON[row["model"]], TECHNIQUES.get(row["technique"])
        ours = model.states if technique is None else model.first_stage(technique)
        yield Compared(
            what=f"{row['model']} {technique or 'states'}", published=float(row["value"]), ours=ours / GIB, work=model.params
        )


# ------------------------------------------------------------------------------------- nanotron


@dataclass(frozen=True)
class Nanotron:
    """nanotron's Llama in bf16, with fp32 gradients, ZeRO-1, flash attention and sequence
    parallelism; the first rank's peak.

    Kept of each token and layer are the gathered inputs of the two fused projections, and of the
    rest this tensor rank's share: two norms' inputs, queries, keys and values, the rotated queries
    and keys, the attention's result, gate and up and two products of them. The head keeps its
    gathered input, and logits in bf16 and twice in fp32.

    Fitted on the rows (dp 1, tp 1, pp 8, micro 4) and (dp 1, tp 8, pp 1, micro 8), which are left
    out: `TEMPORARIES`, the gradients that are there while a layer's backward runs, in hidden
    states, and `BESIDE`, the bytes that are allocated beside states.
    """

    row: Row

    def _int(self, key: str) -> int:
        return int(self.row[key])

    @property
    def layers(self) -> int:
        """The layers of the first rank: it ends with the layer that reaches its share of the costs,
        in which the head counts by its weight."""
        D, F, V = self._int("hidden_size"), self._int("intermediate_size"), VOCABULARY
        each, ranks = 4 * D * D + 3 * D * F, self._int("pp")
        if ranks == 1:
            return self._int("layers")
        return math.floor((self._int("layers") + V * D / each) / ranks) + 1

    @property
    def params(self) -> float:
        D, F = self._int("hidden_size"), self._int("intermediate_size")
        return (self.layers * (4 * D * D + 3 * D * F) + VOCABULARY * D) / self._int("tp")

    @property
    def states(self) -> float:
        return self.params * (2 + 4 + 12 / self._int("dp"))

    @property
    def activations(self) -> float:
        """The bytes at the peak, for each token of a micro-batch."""
        D, F, T = self._int("hidden_size"), self._int("intermediate_size"), self._int("tp")
        of_layer = 2 * 2 * D + (2 * (8 * D + 4 * F) + 4 * self._int("heads") + 16) / T
        if self._int("pp") == 1:
            return self.layers * of_layer + 2 * D + (2 + 4 + 4) * VOCABULARY / T
        in_flight = by_name(
            "1f1b",
            ranks=self._int("pp"),
            virtual_stages=1,
            num_micro_batches=self._int("global_batch_seqs") // self._int("micro_batch") // self._int("dp"),
            rank=0,
            of_stage={0: Kept(1)},
        ).whole[0]
        return in_flight * (self.layers * of_layer + 2 * D / T) + TEMPORARIES * 2 * D / T

    @property
    def peak(self) -> float:
        tokens = self._int("micro_batch") * self._int("seq_len")
        return self.states + BESIDE + self.activations * tokens


VOCABULARY = 50272
TEMPORARIES, BESIDE = 28.7, 106 * MIB
FITTED = {("1", "1", "8", "4"), ("1", "8", "1", "8")}


def nanotron(folder: Path) -> Iterator[Compared]:
    """Yield peaks of allocated memory [MiB]."""
    for row in rows_of(folder, "nanotron_old_bench"):
        if not row["peak_allocated_MiB"]:
            continue
        place = row["dp"], row["tp"], row["pp"], row["micro_batch"]
        if place not in FITTED:
            what = "dp {} tp {} pp {} micro {}".format(*place)
            ours = Nanotron(row)
            yield Compared(
                what=what,
                published=float(row["peak_allocated_MiB"]),
                ours=ours.peak / MIB,
                work=ours.params,
                sweep=f"{row['model']}, {row['gpus']} GPUs",
            )


# ----------------------------------------------------------------------------------- BigScience


@dataclass(frozen=True)
class BigScience:
    """Megatron-DeepSpeed as the BLOOM team ran it: full recomputation, attention with written
    scores, ZeRO-1 in half precision; from "Rebalancing layers" on bf16 with fp32 gradients, and
    the embedding dealt out like a layer. What `nvidia-smi` shows [GB].

    At the update a fp32 copy of this rank's gradients is there too, and a layer's recomputed
    activations once more as their gradients. Stage 0 has DeepSpeed's fp16 optimizer, with fp32
    copies of weights, gradients and unscaled gradients.
    """

    row: Row
    vocabulary: int = 250_880  # 250k, padded for the tensor ranks

    def _int(self, key: str) -> int:
        return int(self.row[key])

    @property
    def _in_bf16(self) -> bool:
        return self.row["section"] == "Rebalancing layers"

    def _state_bytes(self) -> float:
        """Return the bytes of a parameter's states."""
        data = self._int("dp")
        if self.row["zero_stage"] == "0":
            return 2 + 2 + 12 + 4 + 4
        return 2 + 2 + 4 + 12 / data if self._in_bf16 else 2 + 2 + (12 + 4) / data

    def _layers(self, stage: int) -> int:
        ranks, layers = self._int("pp"), self._int("layers")
        if ranks == 1:
            return layers
        if self._in_bf16:
            return math.ceil((layers + 2) / ranks) - (stage in (0, ranks - 1))
        return math.ceil(layers / ranks)

    def of_stage(self, stage: int) -> float:
        """Return the bytes of tensors on a rank of the pipeline."""
        D, T, ranks = self._int("hidden_size"), self._int("tp"), self._int("pp")
        tokens, layers = self._int("seq_len") * self._int("micro_batch"), self._layers(stage)
        params = layers * (12 * D * D / T + 13 * D)
        params += self.vocabulary * D / T * (stage in (0, ranks - 1))
        in_flight = ranks - stage
        passed_on = 2 * tokens * D * in_flight * ((stage > 0) + (stage < ranks - 1))
        scores = 5 * self._int("heads") * self._int("seq_len") / (D * T)
        of_layer = tokens * D * (10 + 24 / T + scores)
        logits = tokens * self.vocabulary / T * (2 + 4 + 4) * (stage == ranks - 1)
        return params * self._state_bytes() + 2 * tokens * D * layers * in_flight + passed_on + 2 * of_layer + logits

    @property
    def peak(self) -> float:
        ranks = self._int("pp")
        tensors = max(map(self.of_stage, {0, min(1, ranks - 1), ranks - 1}))
        # groups of tensor, data, pipeline and model ranks, and the ends of the pipeline
        return tensors * (1 + RESERVE) + CONTEXT_BYTES + 4 * GROUP_BYTES + PAIR_BYTES


NEEDED = ("hidden_size", "layers", "heads", "dp", "tp", "pp", "micro_batch", "seq_len")


def bigscience(folder: Path) -> Iterator[Compared]:
    """Yield used memory, for the rows that say all that it takes [GB]."""
    for row in rows_of(folder, "bigscience_megatron_deepspeed"):
        if row["mem"].endswith("GB") and all(row[key] for key in NEEDED):
            what = f"line {row['line']}: h {row['hidden_size']} dp {row['dp']} tp {row['tp']} pp {row['pp']}"
            D, ranks = int(row["hidden_size"]), int(row["tp"]) * int(row["pp"])
            yield Compared(
                what=f"{what} micro {row['micro_batch']}",
                published=float(row["mem"].removesuffix("GB")),
                ours=BigScience(row).peak / 1e9,
                work=int(row["layers"]) * 12 * D * D / ranks,
                sweep=f"h {D} layers {row['layers']} gpus {row['gpus']}",
            )


TABLES = (
    Table(title="ZeRO, table 1", what="model states [GB]", rows=zero_table),
    Table(title="Korthikanti, figure 7", what="activations [% of tensor parallelism alone]", rows=korthikanti_ratios),
    Table(title="Korthikanti, figure 1", what="first stage [GiB]", rows=korthikanti_bytes),
    Table(
        title="nanotron",
        what="peak allocated [MiB]",
        rows=nanotron,
        fitted="two constants of two rows",
    ),
    Table(title="BigScience", what="used memory [GB]", rows=bigscience),
)
