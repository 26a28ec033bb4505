"""What the guard decides, without a run: windows, checksums, counting, suspects, and the loss scale that it counts by."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parallel.mesh import Group
from parallel.messages import Messages
from parallel.topology import Layout
from tests.unit.loss_scales import reference
from trainer.engine.loss_scale import LossScaler
from trainer.engine.step_result import StepResult
from trainer.errors import EXIT_NO_PROGRESS
from trainer.guard.culprit import GRADIENT, OUTPUT, WEIGHT, Finding
from trainer.guard.guard import REPLAY_FILES, REWINDS, Guard, NoProgress
from trainer.guard.replicas import CHUNK, Held, checksum, disagreements, odd_ones_out
from trainer.guard.spike_window import SpikeWindow
from trainer.launch.ranks import PeerFailed
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.rules import section_findings
from trainer.schema import Recipe

# ------------------------------------------------------------------------------------------------------------- the window


def test_the_limit_is_median_plus_robust_deviations() -> None:
    stream = random.Random(0)
    for _ in range(500):
        size, threshold = stream.randint(8, 40), stream.uniform(1.0, 20.0)
        values = [stream.lognormvariate(0.0, 1.0) for _ in range(size + stream.randint(0, 30))]
        window = SpikeWindow(size, threshold)
        for value in values:
            window.add(value)
        last = np.array(values[-size:])
        deviation = max(1.4826 * np.median(np.abs(last - np.median(last))), 0.01 * abs(np.median(last)))
        assert window.limit == pytest.approx(np.median(last) + threshold * deviation, rel=1e-12)
        assert window.values == values[-size:]


def test_nothing_is_judged_before_the_window_is_full_and_what_is_not_finite_does_not_fill_it() -> None:
    window = SpikeWindow(8, 10.0)
    for value in (1.0, math.nan, 2.0, math.inf, 3.0, -math.inf, 1.5, 2.5, 1.0, 2.0):
        window.add(value)
        assert window.limit == math.inf
    window.add(1.0)
    assert window.limit < 20.0


def test_a_spike_among_equal_values_is_one_and_noise_of_a_percent_is_none() -> None:
    window = SpikeWindow(8, 10.0, [2.0] * 8)
    assert 2.02 < window.limit < 2.3


def test_wild_values_move_it_little_until_they_are_the_most() -> None:
    stream = random.Random(0)
    window = SpikeWindow(20, 10.0, [stream.gauss(1.0, 0.05) for _ in range(20)])
    for wild in range(1, 21):
        seen = window.limit
        window.add(100.0)
        if wild <= 8:
            assert window.limit < 5.0
        if wild >= 12:
            assert seen > 100.0 or window.limit >= 100.0, "a level that stays is no spike"


def test_a_window_goes_on_from_its_values_to_the_bit() -> None:
    stream = random.Random(1)
    whole = SpikeWindow(16, 6.0)
    for _ in range(60):
        resumed = SpikeWindow(16, 6.0, json.loads(json.dumps(whole.values)))
        assert (resumed.limit, resumed.values) == (whole.limit, whole.values)
        whole.add(stream.lognormvariate(0.0, 3.0))


# ----------------------------------------------------------------------------------------------------------- the checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    stream = random.Random(0)
    values = torch.randn(257, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    before = int(checksum(values))
    for _ in range(400):
        flipped = values.clone()
        place, bit = stream.randrange(values.numel()), stream.randrange(8 * values.element_size())
        mask = 1 << bit if bit < 8 * values.element_size() - 1 else -(1 << bit)
        flipped.view(bits)[place] ^= mask
        assert int(checksum(flipped)) != before, (place, bit)


def test_the_checksum_is_the_same_in_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    bits = values.view(torch.int32).tolist()
    expected = sum((2 * place + 1) * bit for place, bit in enumerate(bits))
    expected = (expected + 2**63) % 2**64 - 2**63
    assert int(checksum(values)) == expected
    for chunk in (1, 7, 64, 999):
        monkeypatch.setattr("trainer.guard.replicas.CHUNK", chunk)
        assert int(checksum(values)) == expected


def test_a_change_beyond_the_first_chunk_and_two_swapped_elements_are_seen() -> None:
    values = torch.zeros(CHUNK + 10)
    before = int(checksum(values))
    values[CHUNK + 5] = 1e-45  # the least that fp32 holds: one bit
    after = int(checksum(values))
    assert after != before
    values[CHUNK + 5], values[3] = 0.0, 1e-45
    assert int(checksum(values)) not in (before, after)


def test_nothing_and_what_is_not_contiguous_have_checksums_too() -> None:
    square = torch.arange(9.0).view(3, 3)
    assert int(checksum(torch.empty(0))) == 0
    assert int(checksum(square.t())) == int(checksum(square.t().contiguous())) != int(checksum(square))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("ab", "ranks 0, 1 differ"),
        ("aab", "rank 2 differs from 0, 1"),
        ("abaa", "rank 1 differs from 0, 2, 3"),
        ("abca", "ranks 1, 2 differ from 0, 3"),
        ("aabb", "ranks 0, 1, 2, 3 differ"),
    ],
)
def test_the_minority_is_named(values: str, said: str) -> None:
    assert odd_ones_out(list(values), range(len(values))) == said


def test_one_rank_has_nothing_to_disagree_with() -> None:
    held = [Held("weight", torch.ones(3), Group.alone())]
    assert disagreements(held, Messages.alone(), torch.device("cpu"), step=3, lr=0.1) == []


# ----------------------------------------------------------------------------------------------------------- the suspects


def test_what_comes_first_in_the_flow_of_the_data_is_the_first_suspect() -> None:
    in_order = [
        Finding(WEIGHT, 0, (0, 0), "a", True, 3),
        Finding(OUTPUT, 0, (0, 5), "b", True, 1),
        Finding(OUTPUT, 0, (1, 2), "c", True, 0),
        Finding(OUTPUT, 1, (0, 1), "d", True, 0),
        Finding(GRADIENT, 0, (-1, -2), "e", True, 0),  # the last stage is the first in backward
        Finding(GRADIENT, 0, (0, -9), "f", True, 0),
        Finding(GRADIENT, 0, (0, -1), "g", True, 0),
        Finding(GRADIENT, 1, (-1, -9), "h", True, 0),
    ]
    shuffled = list(in_order)
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled) == in_order
    assert [Finding.from_json(json.loads(json.dumps(vars(found)))) for found in in_order] == in_order


# --------------------------------------------------------------------------------------------------------------- counting


class Healthy:
    """An inspector that finds nothing wrong."""

    def culprit(self, *_: Any, **__: Any) -> None:
        return None

    def disagreements(self, step: int, lr: float) -> list[str]:
        return []

    def loss(self, step: int) -> float:
        return 1.0


@dataclass
class Run:
    """A guard, what it said, and what it reads between steps."""

    guard: Guard
    notes: list[str]
    checkpoints: Any
    scaler: LossScaler


def run_of(folder: Path, *, first: bool = True, memory: dict[str, Any] | None = None, skipped: int = 0, **sections: Any) -> Run:
    recipe = Recipe.model_validate({"model": {"family": "llama"}, **sections})
    plan = BatchPlan(global_sequences=8, micro_sequences=2, dp=2, num_micro_batches=2, row_tokens=16)
    checkpoints: Any = SimpleNamespace(
        memory={"guard": memory} if memory else {}, start_step=0, wait=list, saved_step=None, rewinds=0
    )
    notes: list[str] = []
    scaler = LossScaler.from_recipe(recipe.precision)
    guard = Guard(
        recipe,
        plan,
        Layout(dp=2),
        Healthy(),  # type: ignore[arg-type]
        scaler=scaler,
        checkpoints=checkpoints,
        first_sequence=lambda step: (step + skipped) * plan.global_sequences,
        folder=folder / "guard",
        is_first=first,
        note=notes.append,
    )
    return Run(guard, notes, checkpoints, scaler)


def result(*, loss: float = 1.0, norm: float = 1.0, scale: float = 1.0, skipped: bool = False) -> StepResult:
    return StepResult(torch.tensor([loss], dtype=torch.float64), 10, norm, scale, skipped)


SKIP = result(norm=math.inf, skipped=True)


def test_the_run_ends_after_so_many_skipped_steps_in_a_row(tmp_path: Path) -> None:
    run = run_of(tmp_path, guard={"max_skipped": 3, "check_every": 0}, precision={"dtype": "bf16"})
    guard = run.guard
    for step, outcome in enumerate([SKIP, SKIP, result(), SKIP, SKIP]):
        guard.judge(step, 0.1, outcome, [])
    with pytest.raises(NoProgress, match=r"3 steps in a row were skipped.*optimizer\.lr") as caught:
        guard.judge(5, 0.1, SKIP, [])
    assert caught.value.exit_code == EXIT_NO_PROGRESS == 93
    assert len(caught.value.lines) == 1
    other = run_of(tmp_path, first=False, guard={"max_skipped": 1}).guard
    with pytest.raises(PeerFailed) as silent:
        other.judge(0, 0.1, SKIP, [])
    assert (silent.value.exit_code, silent.value.lines) == (93, [])


def test_a_dynamic_loss_scale_may_search_and_only_its_floor_counts(tmp_path: Path) -> None:
    precision = {"dtype": "fp16", "loss_scale": {"initial_power": 8, "hysteresis": 1, "minimum": 4}}
    run = run_of(tmp_path, guard={"max_skipped": 5}, precision=precision)
    guard = run.guard
    for step, scale in enumerate((256.0, 128.0, 64.0, 32.0, 16.0, 8.0, *[4.0] * 4)):
        assert run.scaler.scale == scale
        run.scaler.update(overflow=True)
        guard.judge(step, 0.1, result(norm=math.inf, scale=scale, skipped=True), [])
    with pytest.raises(NoProgress, match=r"smallest loss scale 4: set precision\.dtype to bf16"):
        guard.judge(10, 0.1, result(norm=math.inf, scale=4.0, skipped=True), [])
    static = run_of(tmp_path, guard={"max_skipped": 1}, precision={"dtype": "fp16", "loss_scale": {"static": 64.0}})
    with pytest.raises(NoProgress, match=r"loss_scale\.static 64"):
        static.guard.judge(0, 0.1, SKIP, [])


def test_zero_means_never(tmp_path: Path) -> None:
    guard = run_of(tmp_path, guard={"max_skipped": 0, "check_every": 0}).guard
    for step in range(100):
        guard.judge(step, 0.1, SKIP, [])
    assert guard.state() == {"skipped_in_a_row": 100}


def test_only_the_newest_records_stay(tmp_path: Path) -> None:
    guard = run_of(tmp_path, guard={"max_skipped": 0, "check_every": 0}).guard
    for step in range(REPLAY_FILES + 7):
        guard.judge(step, 0.1, SKIP, [])
    files = sorted((tmp_path / "guard").iterdir())
    assert [path.name for path in files] == [f"step-{step:08d}.json" for step in range(8, REPLAY_FILES + 8)]
    assert max(path.stat().st_size for path in files) < 2000
    record = json.loads(files[0].read_text())
    assert (record["step"], record["sequences_of_ranks"], record["loss"]) == (8, [[56, 60], [60, 64]], "1.0")


SPIKES = {"max_skipped": 0, "check_every": 0, "spike_window": 8, "spike_threshold": 10.0}


def test_decisions_are_the_same_after_resuming_anywhere(tmp_path: Path) -> None:
    stream = random.Random(0)
    sections = {"guard": {**SPIKES, "on_spike": "skip", "max_skipped": 4}}
    whole = run_of(tmp_path / "whole", **sections)
    guard, spikes = whole.guard, 0
    for step in range(200):
        resumed = run_of(tmp_path / "resumed", memory=json.loads(json.dumps(guard.state())), **sections)
        again = resumed.guard
        assert (again.norm_limit, again.state()) == (guard.norm_limit, guard.state())
        norm = stream.gauss(1.0, 0.1) * (20.0 if stream.random() < 0.05 else 1.0)
        loss = stream.gauss(3.0, 0.1) * (4.0 if stream.random() < 0.05 else 1.0)
        outcome = result(loss=loss, norm=norm, skipped=norm > guard.norm_limit)
        said = len(whole.notes)
        guard.judge(step, 0.1, outcome, [])
        again.judge(step, 0.1, outcome, [])
        assert resumed.notes == whole.notes[said:]
        assert json.dumps(again.state()) == json.dumps(guard.state())
        spikes += bool(resumed.notes)
    assert spikes > 10


def test_a_spike_is_told_and_off_keeps_no_history(tmp_path: Path) -> None:
    warning = run_of(tmp_path, guard={**SPIKES, "on_spike": "warn"})
    guard = warning.guard
    for step in range(8):
        guard.judge(step, 0.1, result(loss=2.0 + step / 100, norm=1.0 + step / 100), [])
    assert guard.norm_limit == math.inf, "warn applies every gradient"
    guard.judge(8, 0.1, result(loss=9.0, norm=1.0), [])
    assert len(warning.notes) == 1
    assert warning.notes[0].startswith("step 9: spike: loss 9 is above ")
    silent = run_of(tmp_path, guard={"check_every": 0})
    guard = silent.guard
    for step in range(9):
        guard.judge(step, 0.1, result(loss=9.0 if step == 8 else 2.0), [])
    assert silent.notes == []
    assert guard.state() == {"skipped_in_a_row": 0}


def test_a_spike_before_the_first_checkpoint_is_told_and_stays(tmp_path: Path) -> None:
    run = run_of(tmp_path, guard={**SPIKES, "on_spike": "rewind"})
    guard = run.guard
    for step in range(9):
        guard.judge(step, 0.1, result(loss=90.0 if step == 8 else 2.0), [])
    assert run.notes[-1] == "there is no checkpoint to go back to yet: training goes on"
    assert not guard.must_rewind


def test_spikes_after_one_checkpoint_whatever_the_data_end_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, guard={**SPIKES, "on_spike": "rewind"})
    guard = run.guard
    for step in range(8):
        guard.judge(step, 0.1, result(loss=2.0), [])
    run.checkpoints.saved_step = run.checkpoints.start_step = 4
    run.checkpoints.rewinds = REWINDS - 1
    guard.judge(8, 0.1, result(loss=90.0), [])
    assert guard.must_rewind
    run.checkpoints.rewinds = REWINDS
    with pytest.raises(
        NoProgress, match=r"3 times in a row .* spiked after step 4, each time on other data: lower optimizer\.lr"
    ):
        guard.judge(9, 0.1, result(loss=90.0), [])


def test_the_sequences_of_a_micro_batch_are_those_of_its_place_in_the_step(tmp_path: Path) -> None:
    from trainer.guard.culprit import Culprit

    guard = run_of(tmp_path).guard
    assert guard._sequences(3, Culprit("loss", (1,), 1)) == [30, 31]  # 3 · 8 + 1 · 4 + 1 · 2
    assert guard._sequences(3, Culprit("loss", (0, 1), 0)) == [24, 25, 28, 29]
    guard = run_of(tmp_path, skipped=2).guard
    assert guard._sequences(1, Culprit("loss", (0, 1), 0)) == [24, 25, 28, 29], "of the data, not of the step"
    assert guard._sequences(3, Culprit("weight x", (0,), None)) == []


# ------------------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("sections", "given", "said"),
    [
        ({"guard": {"on_spike": "skip"}, "zero": {"stage": 1}}, {"guard.on_spike"}, 'legal: "off", "warn", "rewind"'),
        ({"guard": {"on_spike": "rewind"}, "zero": {"stage": 3}}, {"guard.on_spike"}, ""),
        ({"guard": {"on_spike": "rewind"}, "checkpoint": {"every": 0}}, {"guard.on_spike"}, "set checkpoint.every"),
        ({"guard": {"spike_window": 50}}, {"guard.spike_window"}, "used only with guard.on_spike"),
        ({"guard": {"spike_threshold": 5.0}}, {"guard.spike_threshold"}, "used only with guard.on_spike"),
        ({"guard": {"on_spike": "skip"}}, {"guard.on_spike"}, ""),
        ({"guard": {"on_spike": "warn", "spike_window": 50}, "zero": {"stage": 3}}, {"guard.spike_window"}, ""),
    ],
)
def test_keys_that_exclude_each_other_are_refused(sections: dict[str, Any], given: set[str], said: str) -> None:
    recipe = Recipe.model_validate({"model": {"family": "llama"}, **sections})
    findings = [found.message for found in section_findings(recipe, given) if any("guard" in key for key in found.keys)]
    assert len(findings) == bool(said)
    assert all(said in message for message in findings)


# -------------------------------------------------------------------------------------- the loss scale, resumed anywhere


def test_the_loss_scale_equals_the_reference_over_5000_steps_resumed_before_each() -> None:
    """Overflows at a steady rate, a collapse to the floor, and recovery; every position of the window is resumed from."""
    stream = random.Random(0)
    window, hysteresis, minimum = 10, 2, 2.0
    chances = [0.05] * 1500 + [0.9] * 500 + [0.02] * 2000 + [1.0] * 50 + [0.08] * 950
    overflows = [stream.random() < chance for chance in chances]
    expected = reference(2.0**16, window, hysteresis, minimum, overflows)
    scaler, got, positions = LossScaler(2.0**16, window, hysteresis, minimum), [], set()
    for overflow in overflows:
        saved = json.loads(json.dumps(scaler.state()))
        positions.add((scaler.good_steps, scaler.overflows_left))
        scaler = LossScaler(2.0**16, window, hysteresis, minimum)
        scaler.restore(saved)
        assert scaler.state() == saved
        scaler.update(overflow=overflow)
        got.append(scaler.scale)
    assert got == expected
    assert len(overflows) == 5000
    assert {good for good, _ in positions} == set(range(window))
    assert minimum in got
    assert max(got) > 2.0**16
