"""Steps with states, gradients and weights divided over data-parallel ranks, next to the planner's.

MosaicML's table (examples/llm/throughput) is PyTorch's FSDP with everything divided, which is ZeRO
stage 3: weights are gathered for each layer's forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parallel.topology import Layout
from tools.published.comparison import Compared, Row, Table, rows_of
from tools.published.step_times import A100_40, A100_80, Measured, gpt
from trainer.planner.operations import Kernels
from trainer.planner.step_time import Job

# MPT: flash attention, no dropout, norms and GELU as torch has them.
MPT = Kernels(scores_written=False, dropout=False, hidden_passes=12, ffn_passes=4, head_passes=8, calls=(40, 60))
DEVICES = {"a100_80gb": A100_80, "a100_40gb": A100_40}


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
    return Job(
        network=gpt(hidden, layers, heads, length, symbols),
        layout=Layout(dp=gpus),
        kernels=MPT,
        dtype="bf16",
        seq_len=length,
        micro_sequences=micro,
        num_micro_batches=int(row["grad_accum"]),
        recompute="full" if row["activation_checkpointing"] == "True" else "none",
        zero_stage=3,
    )


TABLES = (Table(title="MosaicML, FSDP", what="step [s]", rows=mosaicml),)
