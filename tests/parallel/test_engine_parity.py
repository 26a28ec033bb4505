"""The engine against one process: gradients, norms, losses and updated weights at every ZeRO stage.

SGD shows the gradient itself in the weights: a gradient that is scaled twice or not at all changes them, while Adam would
hide it. The targets are uneven on purpose (row r of a step has a share r/8 of its labels masked), so a mean of
micro-batch means differs from the step's mean in the second digit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.documents import Documents
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.parallel.training import ADAMW, LLAMA, OFFLOADS, Case, G, Outcome, S, assert_same_training, outcome, rows_of_step
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe

NAN_EVERY_DAY = {(0, "fp16"), (1, "bf16"), (2, "fp32"), (3, "bf16")}
LAYOUTS = [(dp, accumulation) for dp in (1, 2, 4) for accumulation in (1, 4) if dp * accumulation <= G]


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["unclipped", "clipped"])
def reference(request: pytest.FixtureRequest) -> tuple[float, Outcome]:
    expected = outcome(Case(clip_norm=request.param))
    assert all(norm > 0.5 for norm in expected.norms), "clipping at 0.3 must be active"
    return request.param, expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dp", "accumulation"),
    [pytest.param(*layout, marks=[] if layout in {(1, 4), (2, 4)} else [pytest.mark.grid]) for layout in LAYOUTS],
)
def test_sgd_equals_one_process(dp: int, accumulation: int, stage: int, reference: tuple[float, Outcome]) -> None:
    clip_norm, expected = reference
    got = outcome(Case(dp=dp, accumulation=accumulation, stage=stage, clip_norm=clip_norm))
    # fp32 sums of up to 8 sequences in another order: seen 2e-7 relative in the loss and norm, 1e-8 in the weights.
    assert_same_training(got, expected, relative=2e-6, weights=1e-6)


@pytest.mark.parametrize("name", OFFLOADS)
def test_adamw_and_offload_equal_one_process(name: str, adamw_reference: Outcome) -> None:
    stage, zero = OFFLOADS[name]
    got = outcome(Case(dp=2, accumulation=2, stage=stage, zero=zero, optimizer=ADAMW, steps=6, clip_norm=0.3))
    # Adam divides by the root of small second moments, which magnifies rounding: seen 2e-7.
    assert_same_training(got, adamw_reference, relative=2e-6, weights=2e-6)


@pytest.fixture(scope="module")
def adamw_reference() -> Outcome:
    return outcome(Case(optimizer=ADAMW, steps=6, clip_norm=0.3))


def test_nvme_offload_changes_no_bit_and_really_swaps(tmp_path: Path) -> None:
    # A rank's share must exceed 1 MiB, or DeepSpeed keeps it in memory.
    wide = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    # Weights as well, and several micro-batches: the last weights of a forward are the first of its backward.
    weights = on_disk | {"max_in_cpu": 0, "buffer_count": 16}
    case = Case(dp=2, accumulation=4, stage=3, optimizer=ADAMW, config=wide)
    got = outcome(replace(case, zero={"offload_optimizer": on_disk, "offload_param": weights}))
    in_memory = outcome(case)
    assert got.losses == in_memory.losses
    for name, weight in in_memory.weights.items():
        np.testing.assert_array_equal(got.weights[name], weight, err_msg=name)
    swapped = sum(path.stat().st_size for path in tmp_path.rglob("*.swp"))
    # fp32 master weights and two moments of a 5 M parameter model.
    assert swapped > 30e6, f"only {swapped} bytes in {tmp_path}"
    assert list(tmp_path.rglob("*param.tensor.swp")), "no weight was swapped"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_equals_its_one_process_run(dtype: str, stage: int, half_reference: dict[str, Outcome]) -> None:
    got = outcome(Case(dp=2, accumulation=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=4))
    expected = half_reference[dtype]
    # The micro-batches' matrix products have other shapes, so bf16 (8 bits) and fp16 (11 bits) round them differently: seen
    # 5e-4 and 3e-5 in the norms. A weight may take AdamW's early steps of lr the other way (fp16: seen 5e-4), and bf16
    # holds norm weights near 1 in steps of 2^-8.
    relative, weights = {"bf16": (1e-3, 5e-3), "fp16": (1e-4, 2e-3)}[dtype]
    assert_same_training(got, expected, relative=relative, weights=weights)
    # Rounding averages out over a step's targets: seen 3e-5 and 1.4e-6.
    np.testing.assert_allclose(got.losses, expected.losses, rtol=relative / 10)


@pytest.fixture(scope="module")
def half_reference() -> dict[str, Outcome]:
    return {dtype: outcome(Case(dtype=dtype, optimizer=ADAMW, steps=4)) for dtype in ("bf16", "fp16")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_accumulates_in_fp32(stage: int) -> None:
    """Sixty-four equal micro-batches sum to 64 times one: in bf16 the sum would stall at 8 bits."""
    got = spawn(accumulate_many, Layout(dp=1), stage)[0]
    # One micro-batch's gradient is a bf16 product, the sum of 64 copies is exact in fp32 (a power of two).
    np.testing.assert_allclose(got[1], got[0], rtol=1e-6)


def accumulate_many(mesh: Mesh, stage: int) -> tuple[float, float]:
    norms = []
    for copies in (1, 64):
        case = Case(stage=stage, dtype="bf16", accumulation=1)
        recipe = case.recipe().model_copy(update={"batch": {"global_sequences": copies, "micro_sequences": 1}})
        recipe = Recipe.model_validate(recipe.model_dump())
        plan = BatchPlan.from_recipe(recipe, 1, "the test")
        network = from_hf("llama", LLAMA)
        engine = Engine(
            recipe,
            plan,
            network,
            mesh,
            torch.device("cpu"),
            deepspeed_config=deepspeed_config(recipe, plan),
            fill=lambda block: initialise(block, seed=0),
        )
        tokens, labels = rows_of_step(0)
        batch = MicroBatch(tokens[:1], Documents(((S,),)), labels[:1])
        norms.append(engine.step([batch] * copies, step=0, lr=0.1).grad_norm)
        engine.close()
    return norms[0], norms[1]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(stage, dtype, marks=[] if (stage, dtype) in NAN_EVERY_DAY else [pytest.mark.grid])
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16", "fp16")
    ],
)
def test_a_nan_on_one_rank_skips_the_step_everywhere(stage: int, dtype: str) -> None:
    case = Case(dp=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=3, poison_step=2)
    poisoned, untouched = outcome(case), outcome(Case(dp=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=2))
    assert poisoned.skipped == [False, False, True]
    assert poisoned.norms[2] == math.inf
    for name, weight in untouched.weights.items():
        np.testing.assert_array_equal(poisoned.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_scale_halves_doubles_and_never_changes_an_update(stage: int) -> None:
    """With window 2 the scale doubles at every second good step; the update of that step must not be halved or doubled."""
    scaled = Case(stage=stage, dtype="fp16", steps=6, loss_scale={"initial_power": 8, "window": 2})
    got, expected = outcome(scaled), outcome(Case(stage=stage, dtype="fp16", steps=6, loss_scale={"static": 256.0}))
    assert got.scales == [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0]
    # Powers of two scale fp16 exactly; only values that were subnormal at the lower scale differ.
    assert_same_training(got, expected, relative=1e-4, weights=5e-4)


def test_dropout_does_not_depend_on_ranks_accumulation_or_recompute() -> None:
    """Masks follow the sequence's place in the step and the token's in the sequence."""
    cases = [
        Case(dp=dp, tp=tp, sequence_parallel=sequence, accumulation=accumulation, stage=stage, recompute=mode, family="gpt2")
        for dp, tp, sequence, accumulation, stage, mode in (
            (1, 1, None, 4, 0, "none"),
            (1, 1, None, 4, 0, "full"),
            (1, 1, None, 4, 0, "selective"),
            (1, 1, None, 1, 0, "none"),
            (2, 1, None, 2, 1, "full"),
            (4, 1, None, 1, 3, "none"),
            (1, 2, False, 4, 0, "selective"),
            (1, 2, True, 4, 2, "full"),
            (2, 2, True, 1, 3, "none"),
        )
    ]
    expected, *others = (outcome(case) for case in cases)
    for got in others:
        assert_same_training(got, expected, relative=2e-6, weights=1e-6)
    for recomputed in others[:2]:
        assert recomputed.losses == expected.losses, "recompute alone must not change one bit"


@pytest.mark.parametrize(
    ("stage", "tp"),
    [
        pytest.param(stage, tp, marks=[] if (stage, tp) in {(3, 2)} else [pytest.mark.grid])
        for stage in (0, 1, 2, 3)
        for tp in (1, 2)
    ],
)
def test_recompute_changes_nothing(stage: int, tp: int) -> None:
    kept, *recomputed = (outcome(Case(dp=2, tp=tp, stage=stage, recompute=mode)) for mode in ("none", "selective", "full"))
    for got in recomputed:
        assert got.losses == kept.losses
        for name, weight in kept.weights.items():
            np.testing.assert_array_equal(got.weights[name], weight, err_msg=name)
