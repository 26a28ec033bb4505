"""Pipelines with ZeRO, tensor and data parallelism, offload, accumulation and clipping against one process.

The model has tied embeddings on its first and last stage, 4 layers, a vocabulary that no degree divides, packed documents and
uneven targets. Weights are updated by SGD, which shows a gradient that is scaled twice or not at all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.parallel.training import (
    ADAMW,
    CPU,
    CPU_ALL,
    FOUR_LAYERS,
    Case,
    assert_equals_one_process,
    assert_same_training,
    in_one_process,
    make_engine,
    outcome,
)
from tests.spawn import spawn
from trainer.errors import RecipeError

SCHEDULES = [
    ("gpipe", 1, (0, 1, 2, 3)),
    ("1f1b", 1, (0, 1, 2, 3)),
    ("interleaved_1f1b", 2, (0, 1, 2, 3)),
    ("looped_bfs", 2, (0, 1, 2, 3)),
    ("interleaved_zero_bubble", 1, (0, 1, 2)),
    ("interleaved_zero_bubble", 2, (0, 1, 2)),
    ("zbv", 2, (0, 1, 2)),
    ("dualpipev", 2, (0, 1, 2)),
]


EVERY_DAY = {("gpipe", 1, 0), ("interleaved_1f1b", 2, 1), ("interleaved_1f1b", 2, 3), ("looped_bfs", 2, 2)} | {
    ("interleaved_zero_bubble", 1, 0),
    ("interleaved_zero_bubble", 2, 2),
    ("zbv", 2, 1),
    ("dualpipev", 2, 2),
}


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "stage"),
    [
        pytest.param(name, v, stage, marks=[] if (name, v, stage) in EVERY_DAY else [pytest.mark.grid])
        for name, v, stages in SCHEDULES
        for stage in stages
    ],
)
def test_every_schedule_trains_alike(schedule: str, virtual_stages: int, stage: int) -> None:
    case = Case(pp=2, accumulation=4, steps=3, clip_norm=0.3, config=FOUR_LAYERS, stage=stage)
    assert_equals_one_process(replace(case, schedule=schedule, virtual_stages=virtual_stages))


@pytest.mark.grid
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
@pytest.mark.parametrize(("schedule", "virtual_stages"), [(name, v) for name, v, _ in SCHEDULES])
def test_every_schedule_on_four_ranks(schedule: str, virtual_stages: int, micro_batches: int) -> None:
    if schedule == "dualpipev" and micro_batches < 8:
        pytest.skip("dualpipev needs two micro-batches per rank")
    layers = {"num_hidden_layers": 4 * virtual_stages}
    case = Case(pp=4, accumulation=micro_batches, sequences=16, steps=3, clip_norm=0.3, config=layers, stage=1)
    assert_equals_one_process(replace(case, schedule=schedule, virtual_stages=virtual_stages))


@pytest.mark.parametrize(
    ("stage", "zero", "schedule", "virtual_stages"),
    [
        pytest.param(1, CPU, "1f1b", 1, marks=[pytest.mark.grid]),
        pytest.param(2, CPU, "1f1b", 1, marks=[pytest.mark.grid]),
        pytest.param(3, CPU_ALL, "1f1b", 1, marks=[pytest.mark.grid]),
        (1, CPU, "interleaved_1f1b", 2),
        (2, CPU, "interleaved_1f1b", 2),
        (3, CPU_ALL, "interleaved_1f1b", 2),
    ],
)
def test_offload_equals_one_process(stage: int, zero: dict[str, Any], schedule: str, virtual_stages: int) -> None:
    case = Case(pp=2, dp=2, accumulation=2, steps=4, clip_norm=0.3, optimizer=ADAMW, stage=stage, zero=zero, config=FOUR_LAYERS)
    # Adam divides by the root of small second moments, which magnifies rounding.
    assert_equals_one_process(replace(case, schedule=schedule, virtual_stages=virtual_stages), weights=2e-6)


@pytest.mark.parametrize(
    ("elements", "zero"),
    [(1, CPU_ALL), *(pytest.param(*pair, marks=pytest.mark.grid) for pair in ((1, {}), (3000, {}), (3000, CPU_ALL)))],
)
def test_stages_with_other_numbers_of_tiles_do_not_wait_for_each_other(elements: int, zero: dict[str, Any]) -> None:
    """DeepSpeed reduces the norm of one tile of the optimizer after another over the stages, and the first has an embedding."""
    zero = {**zero, "sub_group_size": elements}
    case = Case(pp=2, dp=2, accumulation=2, steps=3, clip_norm=0.3, stage=3, zero=zero, config={"num_hidden_layers": 3})
    assert_equals_one_process(case)


def test_split_backwards_with_offload_equal_one_process() -> None:
    """Two stages of one rank share the tied weight, and weight gradients come apart from the others."""
    case = Case(pp=2, accumulation=4, steps=3, clip_norm=0.3, stage=2, zero=CPU, config=FOUR_LAYERS)
    assert_equals_one_process(replace(case, schedule="zbv", virtual_stages=2))


def test_nvme_offload_equals_memory(tmp_path: Path) -> None:
    # A rank's share must exceed 1 MiB, or DeepSpeed keeps it in memory.
    wide = {**FOUR_LAYERS, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    case = Case(pp=2, dp=2, accumulation=2, stage=3, optimizer=ADAMW, config=wide, clip_norm=0.3)
    got = outcome(replace(case, zero={"offload_optimizer": on_disk, "offload_param": on_disk}))
    in_memory = outcome(case)
    # With offload DeepSpeed adds up the norm in another order, and clipping divides by it: seen 2e-8.
    assert_same_training(got, in_memory, relative=1e-6, weights=1e-6)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.swp")) > 10e6


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(stage, dtype, marks=[] if (stage, dtype) in {(1, "bf16"), (0, "fp16")} else [pytest.mark.grid])
        for stage in (0, 1, 2, 3)
        for dtype in ("bf16", "fp16")
    ],
)
def test_half_formats_follow_their_one_process_run(stage: int, dtype: str) -> None:
    case = Case(pp=2, dp=2, accumulation=2, steps=4, dtype=dtype, optimizer=ADAMW, stage=stage, config=FOUR_LAYERS)
    expected, got = in_one_process(case), outcome(case)
    # Matrix products of other shapes are rounded differently, to 8 (bf16) or 11 (fp16) bits.
    relative = {"bf16": 2e-3, "fp16": 3e-4}[dtype]
    np.testing.assert_allclose(got.losses, expected.losses, rtol=relative)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=4 * relative)


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "stage", "recompute"),
    [pytest.param("1f1b", 1, 3, "full", marks=pytest.mark.grid), ("zbv", 2, 1, "selective")],
)
def test_recompute_and_dropout_in_stages(schedule: str, virtual_stages: int, stage: int, recompute: str) -> None:
    case = Case(family="gpt2", config={"n_layer": 4}, pp=2, tp=2, accumulation=4, steps=3, stage=stage, recompute=recompute)
    assert_equals_one_process(replace(case, schedule=schedule, virtual_stages=virtual_stages))


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=[pytest.mark.grid]), 2, pytest.param(3, marks=[pytest.mark.grid])])
def test_a_nan_on_one_stage_skips_the_step_everywhere(stage: int) -> None:
    case = Case(pp=2, dp=2, accumulation=2, stage=stage, optimizer=ADAMW, steps=3, poison_step=2, poisoned_rank=1)
    poisoned, untouched = outcome(case), outcome(replace(case, steps=2, poison_step=None))
    assert poisoned.skipped == [False, False, True]
    assert poisoned.norms[2] == math.inf
    for name, weight in untouched.weights.items():
        np.testing.assert_array_equal(poisoned.weights[name], weight, err_msg=name)


def test_the_ends_stay_bit_equal() -> None:
    """The tied weight's two copies, on the first and the last stage, after any number of steps."""
    first, _, _, last = spawn(tied_copy, Layout(pp=4), Case(pp=4, accumulation=8, steps=5, optimizer=ADAMW, config=FOUR_LAYERS))
    assert first is not None
    np.testing.assert_array_equal(first, last)


def tied_copy(mesh: Any, case: Case) -> np.ndarray | None:
    from tests.parallel.training import make_engine, micro_batches

    engine = make_engine(mesh, case)
    for step in range(case.steps):
        engine.step(micro_batches(mesh, engine.plan, step), step=step, lr=1e-3)
    tied = [parameter.detach().numpy().copy() for parameter, spec in engine.specs if spec.tied]
    engine.close()
    return tied[0] if tied else None


def test_stages_between_read_no_tokens(tmp_path: Path) -> None:
    """Four stages learn as one process does, though the two between have only where documents end."""
    from tools.campaign.cases import WAYS, Way, arguments, write_recipe
    from tools.campaign.ranks import run_ranks
    from trainer.track import read_metrics

    recipe = write_recipe(tmp_path, steps=4, every=0, keep=1)
    losses = {}
    for way in (WAYS[0], Way("pp4", 4, ("parallel.pipeline=4",))):
        run = tmp_path / way.name
        ended = run_ranks(train_without_tokens, arguments(recipe, run, way), world_size=way.processes, log=tmp_path / "log")
        assert not any(ended.codes), ended.said
        losses[way.name] = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    np.testing.assert_allclose(losses["pp4"], losses["one"], rtol=2e-6)


def train_without_tokens(command: list[str]) -> int:
    """`train`, where ranks 1 and 2 cannot read a store."""
    import os

    from tools.campaign.ranks import train
    from trainer.data.store import TokenStore

    if os.environ["RANK"] in ("1", "2"):

        def unreadable(store: TokenStore, begin: int, end: int) -> np.ndarray:
            raise AssertionError("a stage between has read tokens")

        TokenStore.slice = unreadable
    return train(command)


def starts(mesh: Mesh, case: Case) -> str:
    """What a refused engine says."""
    try:
        make_engine(mesh, case).close()
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("buffers", [11, 12])
def test_weights_on_a_drive_have_a_buffer_each_while_they_are_live(buffers: int, tmp_path: Path) -> None:
    wide = {"num_hidden_layers": 3, "hidden_size": 512, "intermediate_size": 1024}  # else DeepSpeed keeps them in memory
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path), "max_in_cpu": 0, "buffer_count": buffers}
    case = Case(stage=3, zero={"offload_param": on_disk}, config=wide, steps=1)
    (said,) = spawn(starts, Layout(), case)
    if buffers == 12:
        assert said == ""
        outcome(case)
    else:
        assert said.startswith("zero.offload_param.buffer_count = 11, but 12 weights may be in memory at once")
