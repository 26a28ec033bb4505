import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.learning_rate import decay_steps, lr_at, schedule_findings
from trainer.schema import Schedule, Train

NAMES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
PEAK = 3e-4


def rates(total: int, **keys: Any) -> list[float]:
    schedule = Schedule(**keys)
    return [lr_at(step, schedule=schedule, peak=PEAK, total_steps=total) for step in range(total)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    name = draw(st.sampled_from(NAMES))
    keys = {"name": name, "warmup_steps": warmup, "min_lr_ratio": draw(st.floats(0, 1))}
    if name == "wsd" and draw(st.booleans()):
        keys["decay_steps"] = draw(st.integers(0, total - warmup))
    return total, keys


@settings(deadline=None)
@given(runs())
def test_bounds_and_shape(run: tuple[int, dict[str, Any]]) -> None:
    total, keys = run
    values = rates(total, **keys)
    top = max(keys["warmup_steps"], 1) - 1
    assert values[top] == pytest.approx(PEAK)
    assert all(0 <= value <= PEAK * (1 + 1e-12) for value in values)
    assert values[0] > 0
    assert values[: top + 1] == sorted(values[: top + 1])
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(values[top:]))


@settings(deadline=None)
@given(runs())
def test_no_jump_at_the_joints(run: tuple[int, dict[str, Any]]) -> None:
    """One step moves no further than the steepest slope of each part."""
    total, keys = run
    values = rates(total, **keys)
    warmup = max(keys["warmup_steps"], 1)
    falling = {
        "constant": 0.0,
        "linear": 1 / max(total - warmup, 1),
        "cosine": math.pi / 2 / max(total - warmup, 1),
        "wsd": 1 / max(min(decay_steps(Schedule(**keys), total), total - warmup), 1),
        "inverse_sqrt": 1 / (2 * warmup),
    }[keys["name"]]
    for step, (before, after) in enumerate(itertools.pairwise(values)):
        assert abs(after - before) <= PEAK * ((1 / warmup if step + 1 < warmup else falling) + 1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@settings(deadline=None)
@given(total=st.integers(2, 300), ratio=st.floats(0, 1), data=st.data())
def test_the_last_step_is_at_the_floor(name: str, total: int, ratio: float, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    assert rates(total, name=name, warmup_steps=warmup, min_lr_ratio=ratio)[-1] == pytest.approx(PEAK * ratio)


def test_formulas_by_hand() -> None:
    assert rates(4, name="constant", warmup_steps=4) == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])
    assert rates(5, name="linear", min_lr_ratio=0.0) == pytest.approx([PEAK * f for f in (1, 0.75, 0.5, 0.25, 0)])
    assert rates(3, name="cosine", min_lr_ratio=0.5) == pytest.approx([PEAK, PEAK * 0.75, PEAK * 0.5])
    wsd = rates(6, name="wsd", warmup_steps=2, decay_steps=2, min_lr_ratio=0.0)
    assert wsd == pytest.approx([PEAK / 2, PEAK, PEAK, PEAK, PEAK / 2, 0])
    assert rates(16, name="inverse_sqrt", warmup_steps=4)[15] == pytest.approx(PEAK / 2)


def test_past_the_end_it_stays_and_before_the_start_it_is_a_mistake() -> None:
    schedule = Schedule(name="linear")
    assert lr_at(10, schedule=schedule, peak=PEAK, total_steps=5) == lr_at(4, schedule=schedule, peak=PEAK, total_steps=5)
    with pytest.raises(ValueError, match="before the first"):
        lr_at(-1, schedule=schedule, peak=PEAK, total_steps=5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup_steps": 11}, "legal: 0 to 10"),
        ({"name": "wsd", "warmup_steps": 4, "decay_steps": 7}, "legal decay_steps: 0 to 6"),
    ],
)
def test_what_cannot_work_is_said(keys: dict[str, Any], said: str) -> None:
    (finding,) = schedule_findings(Schedule(**keys), Train(steps=10))
    assert said in finding.message


@settings(deadline=None)
@given(runs())
def test_what_works_is_not_refused(run: tuple[int, dict[str, Any]]) -> None:
    total, keys = run
    assert list(schedule_findings(Schedule(**keys), Train(steps=total))) == []
