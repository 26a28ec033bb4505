"""The grid: every layout of up to 8 processes, accumulation, ZeRO stage, tied and untied, against one process.

In fp32 twenty steps with active clipping. In float64 gradients before the optimizer, at ZeRO-0 (DeepSpeed's ZeRO keeps fp32
master weights): a rounding difference shrinks, a mistake stays. Weights are updated by SGD, which shows a gradient that is
scaled twice or not at all; the targets are uneven, the documents packed, the vocabulary divides over no degree.

All of it: bash tools/test.sh -m 'grid or not grid' tests/parallel/test_layout_grid.py
"""

from __future__ import annotations

from typing import Any

import pytest

from parallel.topology import Layout
from tests.parallel.training import FOUR_LAYERS, UNTIED, Case, assert_equals_one_process

LAYOUTS = {
    "dp1": Layout(),
    "dp2": Layout(dp=2),
    "dp4": Layout(dp=4),
    "tp2": Layout(tp=2),
    "tp4": Layout(tp=4),
    "pp2": Layout(pp=2),
    "pp4": Layout(pp=4),
    "tp2xpp2": Layout(tp=2, pp=2),
    "tp2xdp2": Layout(tp=2, dp=2),
    "pp2xdp2": Layout(pp=2, dp=2),
    "tp2xpp2xdp2": Layout(tp=2, pp=2, dp=2),
}
EVERY_DAY = {
    ("pp2", 5, 2, "tied"),
    ("pp4", 4, 1, "untied"),
    ("tp2xpp2", 1, 1, "untied"),
    ("dp4", 5, 2, "untied"),
}
EVERY_DAY64 = {("dp2", 5, "tied"), ("tp2", 4, "untied"), ("pp2xdp2", 5, "tied"), ("tp2xpp2xdp2", 1, "tied")}
CONFIGS: dict[str, dict[str, Any]] = {"tied": FOUR_LAYERS, "untied": UNTIED}
GRID = [
    pytest.param(
        name, accumulation, stage, ends, marks=[] if (name, accumulation, stage, ends) in EVERY_DAY else pytest.mark.grid
    )
    for name in LAYOUTS
    for accumulation in (1, 4, 5)
    for stage in (0, 1, 2, 3)
    for ends in CONFIGS
]
GRID64 = [
    pytest.param(name, accumulation, ends, marks=[] if (name, accumulation, ends) in EVERY_DAY64 else pytest.mark.grid)
    for name in LAYOUTS
    for accumulation in (1, 4, 5)
    for ends in CONFIGS
]


def case_of(name: str, accumulation: int, ends: str, **more: Any) -> Case:
    layout = LAYOUTS[name]
    rows = 20 if accumulation == 5 else 16 if accumulation * layout.dp > 8 else 8
    return Case(
        pp=layout.pp, tp=layout.tp, dp=layout.dp, accumulation=accumulation, sequences=rows, config=CONFIGS[ends], **more
    )


@pytest.mark.parametrize(("name", "accumulation", "stage", "ends"), GRID)
def test_twenty_steps_equal_one_process(name: str, accumulation: int, stage: int, ends: str) -> None:
    case = case_of(name, accumulation, ends, stage=stage, steps=20, clip_norm=0.3)
    # fp32 sums in another order; the update magnifies it over 20 steps: seen 1e-6.
    assert_equals_one_process(case, relative=1e-5, weights=2e-6)


@pytest.mark.parametrize(("name", "accumulation", "ends"), GRID64)
def test_float64_shows_no_mistake(name: str, accumulation: int, ends: str) -> None:
    # An SGD step of rate 1 without clipping and decay: weights differ by what the gradients do.
    sgd = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0}
    assert_equals_one_process(
        case_of(name, accumulation, ends, steps=1, dtype="fp64", optimizer=sgd), relative=1e-10, weights=1e-10
    )
