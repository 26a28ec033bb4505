"""Real jobs of the shipped templates: started, signalled, preempted, queued again, ended. Numbers are compared to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import digests, numbers, write_recipe
from tools.campaign.preemption import KINDS, NO_END, differs, one_run, queued_again, set_end
from tools.campaign.slurm import ROOT, Job, Lab, said, steps_logged

STEPS = 120
STEPS_MEANWHILE = 2000  # more than a start trains until the next one asks for the folder
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


@pytest.mark.parametrize(("nodes", "says"), [(2, "to start at"), (4, "warning: SLURM has no place for this job as things are")])
def test_slurm_is_asked_before_a_job_waits_for_ever(nodes: int, says: str, lab: Lab, recipe: Path, tmp_path: Path) -> None:
    words = ("--run-dir", str(tmp_path / "run"), "--nodes", str(nodes), "--ranks-per-node", "1", "--dry-run")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "submit", str(recipe), *words],
        env=lab.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert says in done.stderr
    assert done.stdout == (tmp_path / "run" / "job.sbatch").read_text()
    assert lab.run("squeue", "--noheader") == ""


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


@pytest.mark.timeout(600)
def test_a_recipe_that_is_wrong_by_then_ends_the_job(lab: Lab, recipe: Path, tmp_path: Path) -> None:
    """It was right when it was submitted."""
    run_dir, mine = tmp_path / "run", tmp_path / "recipe.json"
    mine.write_text(recipe.read_text())
    lab.submit(mine, run_dir, "--dry-run", nodes=1, ranks=1)
    mine.write_text(recipe.read_text().replace("global_sequences", "global_sequence"))
    job = lab.run("sbatch", "--parsable", str(run_dir / "job.sbatch"))
    ended = lab.until_ended(job)
    assert (outcome(ended), ended.restarts) == (("FAILED", 78), 0), said(run_dir)
    assert "did you mean batch.global_sequences?" in said(run_dir)
    assert "the ranks ended with 78: not queued again" in said(run_dir)


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_a_debug_job_is_never_queued_again(lab: Lab, recipe: Path) -> None:
    run_dir = recipe.parent / "debug"
    job = lab.submit(recipe, run_dir, "--template", "debug", nodes=1)
    trains(lab, run_dir)
    lab.run("scancel", "--signal=USR1", "--batch", job)
    ended = lab.until_ended(job)
    assert (outcome(ended), ended.restarts) == (("FAILED", 75), 0), said(run_dir)
    assert "SIGUSR1: ended after step" in said(run_dir)


@pytest.mark.grid
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_disturbed_in_every_way_and_finished(kind: str, lab: Lab, tmp_path: Path) -> None:
    """The campaign's own case: a job without an end is disturbed, and ends as one that was not."""
    (case,) = one_run(lab, tmp_path / "case", [kind], seed="1")
    assert case["kind"] == kind
    assert case["identical"], said(tmp_path / "case" / "disturbed")


@pytest.mark.grid
@pytest.mark.timeout(600)
def test_ranks_that_outlive_their_node_s_daemon_hand_the_run_over(lab: Lab, tmp_path: Path) -> None:
    """SLURM starts the job on the other node while all ranks of the first start still train."""
    recipe = write_recipe(tmp_path, steps=NO_END, every=50, keep=2, schedule={"name": "constant", "warmup_steps": 4})
    run_dir = tmp_path / "handed-over"
    job = lab.submit(recipe, run_dir, "--template", "preemptible", nodes=1)
    trains(lab, run_dir)
    (node,) = lab.nodes_of(job)
    lab.silence(node)
    try:
        queued_again(lab, job, 0, said(run_dir))
        set_end(recipe, steps_logged(run_dir) + STEPS_MEANWHILE)
        ended = lab.until_ended(job)
    finally:
        lab.bring_back(node)
    assert outcome(ended) == DONE, said(run_dir)
    assert ended.restarts == 1
    for words in ("the ranks of this job's earlier start live on", "they are asked to save and end"):
        assert words in said(run_dir)
    assert differs(recipe, run_dir, tmp_path / "undisturbed") is None


@pytest.mark.grid
@pytest.mark.timeout(600)
@pytest.mark.parametrize("template", ["multi-node", "torchrun"])
def test_out_of_time_at_two_nodes_of_two_ranks(template: str, lab: Lab, recipe: Path, tmp_path: Path) -> None:
    """SLURM itself sends the signal that --signal names; the job goes on under its id and reaches its end."""
    run_dir, mine = tmp_path / "run", tmp_path / "recipe.json"
    endless = recipe.read_text().replace(f'"steps": {STEPS}', '"steps": 1000000').replace("cosine", "constant")
    mine.write_text(endless)
    job = lab.submit(mine, run_dir, "--template", template, "--grace", "30")
    trains(lab, run_dir)
    lab.bring_the_end_near(job, 30)
    lab.until(lambda: lab.job(job).restarts == 1, 200, f"the time comes near\n{said(run_dir)}")
    end = steps_logged(run_dir) + 20
    mine.write_text(endless.replace("1000000", str(end)))
    lab.limit(job, minutes=30)
    ended = lab.until_ended(job)
    assert outcome(ended) == DONE, said(run_dir)
    assert "SIGUSR1: ended after step" in said(run_dir)
    assert [record[0] for record in numbers(run_dir)] == list(range(1, end + 1))


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
