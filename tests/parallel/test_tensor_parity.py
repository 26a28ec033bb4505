"""Tensor and sequence parallelism with ZeRO, accumulation, clipping and offload against one process.

The model has 4 query heads that share 2 key/value heads, so at tensor degree 4 two ranks hold the same key/value head, a
vocabulary of 67 that no degree divides, tied embeddings, and uneven targets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.training import ADAMW, Case, Outcome, assert_same_training, in_one_process, outcome

STEPS = 20


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return outcome(Case(steps=STEPS, clip_norm=0.3))


WAYS = [(1, None), (2, False), (2, True), (4, False), (4, True)]
EVERY_DAY = {(1, 2, 0), (2, 2, 1), (2, 1, 2), (2, 2, 3), (4, 1, 0)}  # (tensor, data, ZeRO)
GRID = [
    pytest.param(tp, sequence, dp, stage, marks=[] if (tp, dp, stage) in EVERY_DAY else [pytest.mark.grid])
    for tp, sequence in WAYS
    for dp in (1, 2)
    for stage in (0, 1, 2, 3)
]


@pytest.mark.parametrize(("tp", "sequence", "dp", "stage"), GRID)
def test_twenty_steps_equal_one_process(tp: int, sequence: bool | None, dp: int, stage: int, one_process: Outcome) -> None:
    got = outcome(Case(steps=STEPS, clip_norm=0.3, tp=tp, sequence_parallel=sequence, dp=dp, stage=stage))
    assert got.initial_hash == one_process.initial_hash
    # fp32 sums in another order, through 20 steps: seen 1e-6 relative.
    assert_same_training(got, one_process, relative=1e-5, weights=2e-6)


OFFLOADS = {
    "zero1-cpu": (1, {"offload_optimizer": {"device": "cpu"}}),
    "zero2-cpu": (2, {"offload_optimizer": {"device": "cpu"}}),
    "zero3-cpu": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_under_tensor_ranks_equals_one_process(name: str) -> None:
    stage, zero = OFFLOADS[name]
    case = Case(accumulation=2, optimizer=ADAMW, steps=4, clip_norm=0.3)
    got = outcome(replace(case, dp=2, tp=2, stage=stage, zero=zero))
    # Adam divides by the root of small second moments, which magnifies rounding.
    assert_same_training(got, in_one_process(case), relative=2e-6, weights=2e-6)


def test_nvme_offload_under_tensor_ranks_changes_no_bit(tmp_path: Path) -> None:
    # A rank's share must exceed 1 MiB, or DeepSpeed keeps it in memory.
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    case = Case(tp=2, stage=3, optimizer=ADAMW, config=wide)
    got = outcome(replace(case, zero={"offload_optimizer": on_disk, "offload_param": on_disk}))
    in_memory = outcome(case)
    assert got.losses == in_memory.losses
    for name, weight in in_memory.weights.items():
        np.testing.assert_array_equal(got.weights[name], weight, err_msg=name)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.swp")) > 10e6


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(
            stage, dtype, marks=[] if (stage, dtype) in {(0, "bf16"), (2, "bf16"), (3, "fp16")} else [pytest.mark.grid]
        )
        for stage in (0, 1, 2, 3)
        for dtype in ("bf16", "fp16")
    ],
)
def test_half_formats_follow_the_fp32_run(stage: int, dtype: str, half_reference: dict[str, Outcome]) -> None:
    got = outcome(Case(dp=2, tp=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=4))
    # Partial sums over ranks are rounded to 8 (bf16) or 11 (fp16) bits where one process does not round.
    relative = {"bf16": 5e-3, "fp16": 5e-4}[dtype]
    np.testing.assert_allclose(got.losses, half_reference[dtype].losses, rtol=relative)
    np.testing.assert_allclose(got.norms, half_reference[dtype].norms, rtol=4 * relative)


@pytest.fixture(scope="module")
def half_reference() -> dict[str, Outcome]:
    return {dtype: outcome(Case(dtype=dtype, optimizer=ADAMW, steps=4)) for dtype in ("bf16", "fp16")}


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.grid) for stage in (0, 1, 2)), 3])
def test_a_nan_on_one_tensor_rank_skips_the_step_everywhere(stage: int) -> None:
    case = Case(dp=2, tp=2, stage=stage, optimizer=ADAMW, steps=3, poison_step=2, poisoned_rank=3)
    poisoned, untouched = outcome(case), outcome(replace(case, steps=2, poison_step=None))
    assert poisoned.skipped == [False, False, True]
    assert poisoned.norms[2] == math.inf
    for name, weight in untouched.weights.items():
        np.testing.assert_array_equal(poisoned.weights[name], weight, err_msg=name)
