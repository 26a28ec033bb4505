"""Who may write in a run folder, and how the next start of a SLURM job gets it from ranks that SLURM has lost."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from trainer.cluster import lease
from trainer.cluster.lease import HOLDER, WANTED, JobStart, Lease, StillLeased, leased
from trainer.errors import EXIT_RECIPE, EXIT_REQUEUE, RecipeError

FIRST, SECOND = JobStart("7", 0), JobStart("7", 1)
_context = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 0.1)


def hold_until_told(folder: Path, start: JobStart, gate: Connection) -> None:
    with leased(folder, start):
        gate.send("held")
        gate.recv()


@pytest.fixture
def held_elsewhere(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that another process holds, as the start that the test names."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=hold_until_told, args=(tmp_path, request.param, theirs))
    process.start()
    assert ours.recv() == "held"
    yield tmp_path
    ours.send("go")
    process.join()


@pytest.mark.parametrize("held_elsewhere", [JobStart(), JobStart("8", 0), SECOND, JobStart("7", 2)], indirect=True)
def test_another_run_is_not_asked_to_go(held_elsewhere: Path) -> None:
    """No job, another job, this very start, and a later one."""
    with pytest.raises(RecipeError, match="another process is training in it") as refused, leased(held_elsewhere, SECOND):
        pass
    assert refused.value.exit_code == EXIT_RECIPE
    assert not (held_elsewhere / WANTED).exists()


@pytest.mark.parametrize("held_elsewhere", [FIRST], indirect=True)
def test_an_earlier_start_that_does_not_go_is_told_of_and_the_job_may_try_again(held_elsewhere: Path) -> None:
    said: list[str] = []
    asking = leased(held_elsewhere, SECOND, patience_s=0.1, say=said.append)
    with pytest.raises(StillLeased, match="scancel does not reach them") as refused, asking:
        pass
    assert refused.value.exit_code == EXIT_REQUEUE
    assert "they are asked to save and end" in said[0]
    assert json.loads((held_elsewhere / WANTED).read_text()) == {"job": "7", "restarts": 1}


def test_a_start_knows_that_a_later_one_waits(tmp_path: Path) -> None:
    with leased(tmp_path, FIRST) as mine:
        assert not mine.is_wanted
        for words, wanted in (
            ({"job": "7", "restarts": 1}, True),
            ({"job": "7", "restarts": 0}, False),
            ({"job": "8", "restarts": 1}, False),
            ({"job": "7"}, False),
        ):
            (tmp_path / WANTED).write_text(json.dumps(words))
            assert mine.is_wanted is wanted
        (tmp_path / WANTED).write_text("{torn")
        assert not mine.is_wanted
    with leased(tmp_path, SECOND) as theirs:
        assert not (tmp_path / WANTED).exists()
        assert not theirs.is_lost
        assert mine.is_lost


def test_no_job_has_no_later_start(tmp_path: Path) -> None:
    with leased(tmp_path, JobStart()) as mine:
        (tmp_path / WANTED).write_text(json.dumps({"job": "", "restarts": 1}))
        assert not mine.is_wanted
        assert not Lease(tmp_path, JobStart(), (0, 0)).is_lost


def test_what_slurm_says_of_a_start() -> None:
    assert JobStart.from_environment({}) == JobStart("", 0)
    assert JobStart.from_environment({"SLURM_JOB_ID": "7"}) == FIRST
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert JobStart.from_environment(array) == JobStart("7_3", 2)


def test_a_killed_holder_leaves_its_name_and_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text(json.dumps({"job": "7", "restarts": 0, "host": "gone", "pid": 1}))
    with leased(tmp_path, SECOND, say=lambda line: pytest.fail(line)):
        assert json.loads((tmp_path / HOLDER).read_text())["restarts"] == 1
