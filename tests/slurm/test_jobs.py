"""Real jobs of the shipped templates: started, signalled, preempted, queued again, ended. Numbers are compared to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import digests, numbers, write_recipe
from tools.campaign.slurm import Job, Lab, said, steps_logged

STEPS = 120
DONE = ("COMPLETED", 0)


def outcome(job: Job) -> tuple[str, int]:
    return job.state, job.exit_code


def record(run_dir: Path) -> tuple[Any, Any]:
    return numbers(run_dir), digests(run_dir / "checkpoints" / f"step-{STEPS:08d}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("a recipe"), steps=STEPS, every=50, keep=2)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, recipe: Path) -> Path:
    """A run of 2 nodes × 2 ranks that srun starts."""
    run_dir = recipe.parent / "undisturbed"
    ended = lab.until_ended(lab.submit(recipe, run_dir))
    assert outcome(ended) == DONE, said(run_dir)
    assert ended.restarts == 0, "a finished run was queued again"
    return run_dir


def trains(lab: Lab, run_dir: Path) -> None:
    lab.until(lambda: steps_logged(run_dir) >= 5, 120, f"{run_dir} trains")


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_torchrun_on_each_node_is_the_run_of_srun(lab: Lab, recipe: Path, undisturbed: Path) -> None:
    run_dir = recipe.parent / "torchrun"
    assert outcome(lab.until_ended(lab.submit(recipe, run_dir, "--template", "torchrun"))) == DONE, said(run_dir)
    assert record(run_dir) == record(undisturbed)
    assert (undisturbed / "job.sbatch").stat().st_mode & 0o777 == 0o600


@pytest.mark.timeout(600)
@pytest.mark.parametrize("template", ["preemptible", pytest.param("torchrun", marks=pytest.mark.grid)])
def test_warned_saved_queued_again_and_finished(template: str, lab: Lab, recipe: Path, undisturbed: Path) -> None:
    run_dir = recipe.parent / f"warned-{template}"
    job = lab.submit(recipe, run_dir, "--template", template)
    trains(lab, run_dir)
    lab.run("scancel", "--signal=USR1", "--batch", job)
    ended = lab.until_ended(job)
    assert outcome(ended) == DONE, said(run_dir)
    assert ended.restarts == 1, said(run_dir)
    assert "SIGUSR1: ended after step" in said(run_dir)
    assert "queued again, to go on after step" in said(run_dir)
    assert record(run_dir) == record(undisturbed)


def never_trains(folder: Path) -> dict[str, str]:
    """A site's environment in which each rank says at once that it was interrupted."""
    folder.mkdir()
    code = 'import os, sys\nif sys.orig_argv[1:4] == ["-m", "trainer", "train"]:\n    os._exit(75)\n'
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_three_restarts_without_progress_end_it(lab: Lab, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(recipe, run_dir, nodes=1, ranks=1, environment=never_trains(tmp_path / "site"))
    ended = lab.until_ended(job)
    assert outcome(ended) == ("FAILED", 93), said(run_dir)
    assert ended.restarts == 3
    assert "3 restarts in a row left no checkpoint after step 0: not queued again" in said(run_dir)
    assert json.loads((run_dir / "requeue.json").read_text())["idle"] == 3


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_preempted_and_finished(lab: Lab, recipe: Path, undisturbed: Path) -> None:
    run_dir = recipe.parent / "preempted"
    job = lab.submit(recipe, run_dir, "--template", "preemptible", partition="low")
    trains(lab, run_dir)
    lab.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    ended = lab.until_ended(job)
    assert outcome(ended) == DONE, said(run_dir)
    assert ended.restarts == 1
    assert record(run_dir) == record(undisturbed)


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_requeued_by_hand_and_finished(lab: Lab, recipe: Path, undisturbed: Path) -> None:
    run_dir = recipe.parent / "requeued"
    job = lab.submit(recipe, run_dir)
    trains(lab, run_dir)
    lab.run("scontrol", "requeue", job)
    ended = lab.until_ended(job)
    assert outcome(ended) == DONE, said(run_dir)
    assert ended.restarts == 1
    assert record(run_dir) == record(undisturbed)


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_cancelled_stays_cancelled(lab: Lab, recipe: Path) -> None:
    run_dir = recipe.parent / "cancelled"
    job = lab.submit(recipe, run_dir)
    trains(lab, run_dir)
    lab.run("scancel", job)
    lab.until(lambda: not lab.run("squeue", "--noheader", f"--jobs={job}"), 60, "the job leaves")
    assert lab.job(job).state == "CANCELLED"
    assert "queued again" not in said(run_dir).replace("not queued again", "")


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_a_sweep_is_a_run_for_each_line(lab: Lab, recipe: Path) -> None:
    run_dir, sweep = recipe.parent / "sweep", recipe.parent / "sweep.jsonl"
    sweep.write_text('["run.seed=1", "train.steps=4"]\n["run.seed=2", "train.steps=4"]\n')
    job = lab.submit(recipe, run_dir, "--template", "array", "--sweep", str(sweep), nodes=1, ranks=1)
    lab.until(lambda: not lab.run("squeue", "--noheader", f"--jobs={job}"), 200, "the array ends")
    runs = [numbers(run_dir / f"task-{task}") for task in (0, 1)]
    assert [len(run) for run in runs] == [4, 4], said(run_dir)
    assert runs[0] != runs[1]
