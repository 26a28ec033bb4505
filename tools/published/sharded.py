"""Steps with states, gradients and weights divided over data-parallel ranks, next to the planner's.

MosaicML's table (examples/llm/throughput) is PyTorch's FSDP with everything divided, which is ZeRO
stage 3: weights are gathered for each layer's forward and backward, beside the computation.

Of DeepSpeed's offload on one V100 only the job of 10 billion parameters was published with its
batch (DeepSpeed's tutorial ZeRO-Offload: 50 layers, hidden size 4096, 10 sequences), and two rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from parallel.topology import Layout
from tools.published.comparison import Compared, Row, Table, rows_of
from tools.published.step_times import A100_40, A100_80, KORTHIKANTI, MEGATRON, OF_KORTHIKANTI, Measured, gpt
from trainer.costs.blocks import count_parameters
from trainer.planner.devices import listed
from trainer.planner.operations import Kernels
from trainer.planner.step_time import Job, step_time
from trainer.planner.zero_step import ZeroJob

# MPT: flash attention, no dropout, norms and GELU as torch has them.
MPT = Kernels(scores_written=False, dropout=False, hidden_passes=12, ffn_passes=4, head_passes=8, calls=(40, 60))
# Its attention is the first FlashAttention: 25 to 40 % of an A100's peak (Dao 2023,
# arXiv:2307.08691, section 1).
FIRST_FLASH = 0.325
DEVICES = {
    "a100_80gb": replace(A100_80, attention_share=FIRST_FLASH),
    "a100_40gb": replace(A100_40, attention_share=FIRST_FLASH),
}
# One V100 has the whole host: two sockets of six channels of DDR4-2666. Adam moves 28 bytes of each
# weight at 0.7 of their rate, as the sheets assume.
DGX_2 = replace(listed("v100-32g"), host_adam=0.7 * 256e9 / 28)
TENSORS, MODULES = 8, 1  # of a layer: trained weights, and units that FSDP gathers


def mosaicml(folder: Path) -> Iterator[Compared]:
    """Yield steps of 125M to 70B parameters on 8 to 128 A100."""
    for row in rows_of(folder, "mosaicml_examples_2023"):
        if row["gpu"] in DEVICES and row["throughput_tokens_per_s"]:
            seconds = float(row["global_batch_size_tokens"]) / float(row["throughput_tokens_per_s"])
            what = f"{row['section']} {row['model']}, {row['seq_len_tokens']} tokens, {row['gpus']} GPUs"
            yield Measured(what, seconds, _job(row)).on(DEVICES[row["gpu"]])


def _job(row: Row) -> Job:
    length, micro, gpus = (int(row[key]) for key in ("seq_len_tokens", "micro_batch_size_per_gpu", "gpus"))
    hidden, layers, heads, symbols = (int(row[key]) for key in ("d_model", "n_layers", "n_heads", "vocab_size"))
    job = Job(
        network=gpt(hidden, layers, heads, length, symbols),
        layout=Layout(dp=gpus),
        kernels=MPT,
        dtype="bf16",
        seq_len=length,
        micro_sequences=micro,
        num_micro_batches=int(row["grad_accum"]),
        recompute="full" if row["activation_checkpointing"] == "True" else "none",
    )
    return replace(job, zero=_zero(job, stage=3, optimizer_on="none"))


def offload(folder: Path) -> Iterator[Compared]:
    """Yield FLOP/s of one V100 with Adam in the host's memory [TFLOP/s]; the recomputed forward is
    counted."""
    job = Job(
        network=gpt(4096, 50, 32, 1024, 50304),
        layout=Layout(),
        kernels=MEGATRON,
        dtype="fp16",
        seq_len=1024,
        micro_sequences=10,
        num_micro_batches=1,
        recompute="full",
    )
    job = replace(job, zero=_zero(job, stage=2, optimizer_on="cpu"))
    ours = 4 / 3 * Measured("", 1.0, job).flops / step_time(job, DGX_2).total / 1e12
    for row in rows_of(folder, "deepspeed_offload"):
        if row["params_b"] == "10" and "ZeRO-3" not in row["technique"]:
            yield Compared(what=row["technique"], published=float(row["tflops_per_gpu"]), ours=ours)


def _zero(job: Job, *, stage: int, optimizer_on: str) -> ZeroJob:
    trained, layers = count_parameters(job.network), job.network.num_layers
    return ZeroJob(
        stage=stage,
        ranks=job.layout.dp,
        stride=1,
        trained=trained,
        frozen=0,
        tensors=TENSORS * layers,
        modules=MODULES * layers,
        divided=trained,
        live=0,
        itemsize=2,
        reduced=2,
        dtype=job.dtype,
        micro_batches=job.num_micro_batches,
        overlaps=True,
        optimizer_on=optimizer_on,
        weights_on="none",
        states=2,
    )


TABLES = (
    Table(title="MosaicML, FSDP", what="step [s]", rows=mosaicml, fitted=OF_KORTHIKANTI, reference=KORTHIKANTI),
    Table(title="DeepSpeed, offload", what="10B on one V100 [TFLOP/s]", rows=offload),
)
