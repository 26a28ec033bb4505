"""Tensor and sequence parallelism with ZeRO, accumulation, clipping and offload against one process.

The model has 4 query heads that share 2 key/value heads, so at tensor degree 4 two ranks hold the same key/value head, a
vocabulary of 67 that no degree divides, tied embeddings, and uneven targets.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.parallel.test_engine_parity import Case, Outcome, assert_same_training, outcome

STEPS = 20


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return outcome(Case(steps=STEPS, clip_norm=0.3))


WAYS = [(1, None), (2, False), (2, True), (4, False), (4, True)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize(("tp", "sequence"), WAYS)
def test_twenty_steps_equal_one_process(tp: int, sequence: bool | None, dp: int, stage: int, one_process: Outcome) -> None:
    got = outcome(Case(steps=STEPS, clip_norm=0.3, tp=tp, sequence_parallel=sequence, dp=dp, stage=stage))
    assert got.initial_hash == one_process.initial_hash
    # fp32 sums in another order, through 20 steps: seen 1e-6 relative.
    np.testing.assert_allclose(got.losses, one_process.losses, rtol=1e-5)
    np.testing.assert_allclose(got.norms, one_process.norms, rtol=1e-5)
    assert_same_training(got, one_process, relative=1e-5, weights=2e-6)
