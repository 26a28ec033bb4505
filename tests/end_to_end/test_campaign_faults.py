"""Everyday slices of four campaigns: a rank that is killed in any phase, or at a system call of a save, a disk that fills
during one, a rank that no longer gets on.

All cases: `python -m tools.campaign.kills`, and the same with `kill_in_save`, `disk_full`, `hangs`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.campaign import disk_full, hangs, kill_in_save, kills
from tools.campaign.phases import Moment

ROOT = Path(__file__).parents[2]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
needs_private_mounts = pytest.mark.skipif(
    not disk_full.can_mount(), reason="unshare cannot mount a tmpfs in a namespace of its own here"
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> kills.Stage:
    return kills.Stage("dp2-zero1:async", tmp_path_factory.mktemp("kills"))


KILLED = [
    (1, Moment("making the groups", 1, 1)),  # the other waits for it in the store
    (0, Moment("reading the data", 1, 500)),  # the other waits for a file, and the store has gone
    (1, Moment("backward", 4, 200)),
    (0, Moment("renaming a save", 2, 100)),  # in the thread behind
    (0, Moment("closing", 1, 4000)),
]


@pytest.mark.parametrize(("rank", "moment"), KILLED, ids=[moment.phase for _, moment in KILLED])
def test_a_run_of_which_a_rank_is_killed_ends_and_goes_on_to_the_same_bits(
    rank: int, moment: Moment, stage: kills.Stage
) -> None:
    outcome = kills.judged(stage, kills.Case("anew", rank, moment))
    assert outcome["passed"], outcome


@pytest.mark.grid
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scene", kills.SCENES)
def test_killed_in_any_phase_of_any_story(scene: str, tmp_path: Path) -> None:
    """Each phase once, the moment drawn by seed 0."""
    stage = kills.Stage(scene, tmp_path)
    outcomes = [kills.one_case(number, 0, [scene], lambda _: stage) for number in range(len(stage.phases))]
    assert [outcome for outcome in outcomes if not outcome["passed"]] == []


@needs_strace
@pytest.mark.parametrize("scene", [pytest.param(scene, marks=pytest.mark.grid) for scene in ("one:sync", "one:async")])
def test_a_run_that_is_killed_in_a_save_goes_on_to_the_same_bits(scene: str, tmp_path: Path) -> None:
    # Every 31st of 242 system calls: from before the draft to the removal of the older checkpoint.
    tally = kill_in_save.run(scene, tmp_path, saves=[2], stride=31)
    assert tally.points >= 6
    assert tally.killed == tally.resumed == tally.identical == tally.passed == tally.points


@needs_strace
def test_a_run_that_is_killed_in_its_first_save_begins_again(tmp_path: Path) -> None:
    # Before the draft, in it, before the rename, and after it.
    tally = kill_in_save.run("one:sync", tmp_path, saves=[1], only=["mkdir:1", "write:5", "rename:2", "fsync:11"])
    assert tally.passed == tally.killed == tally.points == 4


@needs_strace
@needs_private_mounts
def test_training_goes_on_when_the_disk_fills_and_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The save sees it beforehand; the disk fills in its tensors, in its last file; a system call fails in the middle.
    cases = ["60%", "all-but-1-pages", "write:9/ENOSPC"]
    monkeypatch.chdir(ROOT)  # where the process of its own finds the campaign
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    code = disk_full.main(["--scenes", "one:sync", "--kinds", "short", "filling", "errors", "--only", *cases])
    said, complaints = capfd.readouterr()
    total: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert (total["n"], total["passed"], code) == (4, 4, 0), said + complaints


# Case numbers of the campaign's seed 0: which rank, in which step, in the data or in the step.
HANGS = [
    (3, "pp2", "skip"),
    pytest.param(5, "dp2-zero1", "gil", marks=pytest.mark.grid),
    *(
        pytest.param(case, layout, fault, marks=pytest.mark.grid)
        for case, (layout, fault) in enumerate(
            [("dp2-zero1", "loop"), ("tp2", "file"), ("dp2-zero3", "skip"), ("tp2", "extra"), ("pp2", "stop"), ("pp2", "kill")]
        )
    ),
]


@pytest.mark.parametrize(("case", "layout", "fault"), HANGS)
def test_a_rank_that_does_not_get_on_is_named_and_all_ranks_end(case: int, layout: str, fault: str, tmp_path: Path) -> None:
    outcome = hangs.one_case(case, 0, [layout], [fault], tmp_path)
    assert outcome["passed"], outcome
    assert list(tmp_path.iterdir()) == []


@pytest.mark.grid
@pytest.mark.parametrize("cause", ["data", "computation", "wandering"])
def test_a_slow_rank_is_named_and_slowness_that_wanders_is_not(cause: str, tmp_path: Path) -> None:
    outcome = hangs.slow_case(1, "dp2-zero1", cause, tmp_path)
    assert outcome["passed"], outcome
