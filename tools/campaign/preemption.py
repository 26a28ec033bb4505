"""Runs in a real SLURM that are warned, requeued, preempted, killed and lose nodes, again and again, with nobody's help.

    python -m tools.campaign.preemption --cases 50

Runs of 2 nodes × 1 rank are disturbed --each times in their middle, at a random step, and must come to their end with the same
record, to the byte, as a run that nobody disturbed. A JSON line for each case, and a summary; exit 1 if one differs. A minute
a case where one start takes ten seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.campaign.cases import Way, arguments, digests, first_difference, numbers, report, write_recipe
from tools.campaign.ranks import run_ranks, train
from tools.campaign.slurm import Lab, said, steps_logged
from trainer.requeue import newest_step
from trainer.run_folder import RunFolder

KINDS = ("warned", "requeued", "preempted", "killed", "node lost", "batch node lost")
TWO = Way("dp2", 2)
NO_END = 1_000_000
PATIENCE_S = 240.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--each", type=int, default=6, metavar="N", help="cases in one run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after so long")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    started, cases = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="triaxis-preemption-") as folder:
        lab = Lab(Path(folder) / "lab", nodes=3)
        try:
            lab.start()
            while len(cases) < chosen.cases and time.monotonic() - started < chosen.seconds:
                kinds = [KINDS[n % len(KINDS)] for n in range(len(cases), min(chosen.cases, len(cases) + chosen.each))]
                cases += list(one_run(lab, Path(folder) / f"run-{len(cases)}", kinds, draw))
        finally:
            lab.stop()
    identical = sum(case["identical"] for case in cases)
    report(
        summary="preemption",
        n=len(cases),
        identical=identical,
        by_kind={kind: sum(case["kind"] == kind for case in cases) for kind in KINDS},
        human_edits=0,
        steps_done_twice=sum(case["steps_done_twice"] for case in cases),
        median_s_to_train_again=round(statistics.median(case["s_to_train_again"] for case in cases), 1) if cases else None,
        wall_s=round(time.monotonic() - started),
    )
    return 0 if cases and identical == len(cases) else 1


def one_run(lab: Lab, folder: Path, kinds: list[str], draw: random.Random) -> Iterator[dict[str, Any]]:
    """A run that is disturbed in each of these ways, and then told where its end is."""
    recipe = write_recipe(folder, steps=NO_END, every=20, keep=2, schedule={"name": "constant", "warmup_steps": 4})
    run_dir = folder / "disturbed"
    job = lab.submit(recipe, run_dir, "--template", "preemptible", nodes=2, ranks=1, partition="low")
    cases = []
    for number, kind in enumerate(kinds):
        trains(lab, run_dir)
        time.sleep(draw.random() * 2)
        step, restarts = steps_logged(run_dir), lab.job(job).restarts
        if number == len(kinds) - 1:
            set_end(recipe, step + 60)  # what is disturbed still has none; what is queued again ends there
        begun = time.monotonic()
        lost = disturb(lab, kind, job, draw)
        lab.until(lambda before=restarts: lab.job(job).restarts > before, PATIENCE_S, f"{kind}: queued again\n{said(run_dir)}")
        if lost:
            lab.bring_back(lost)
        lab.until(lambda: lab.job(job).state == "RUNNING", PATIENCE_S, f"{kind}: runs again")
        went_on = newest_step(RunFolder(run_dir))  # its ranks have not come so far as to save
        trains(lab, run_dir, job)
        cases.append(
            {
                "kind": kind,
                "step": step,
                "steps_done_twice": max(0, step - went_on),
                "s_to_train_again": round(time.monotonic() - begun, 1),
            }
        )
    ended = lab.until_ended(job)
    difference = differs(recipe, run_dir, folder / "undisturbed")
    identical = ended.state == "COMPLETED" and difference is None
    for case in cases:
        report(**case, run=folder.name, identical=identical)
        yield {**case, "identical": identical}
    if not identical:
        report(run=folder.name, state=ended.state, exit_code=ended.exit_code, difference=difference, said=said(run_dir)[-4000:])


def trains(lab: Lab, run_dir: Path, job: str | None = None) -> None:
    """Until the history grows (a run that goes on first cuts it), or the job has ended already."""
    last = NO_END

    def grows() -> bool:
        nonlocal last
        before, last = last, steps_logged(run_dir)
        return 0 < before < last or (job is not None and lab.job(job).state == "COMPLETED")

    lab.until(grows, PATIENCE_S, f"{run_dir} trains\n{said(run_dir)[-2000:]}")


def set_end(recipe: Path, steps: int) -> None:
    value = json.loads(recipe.read_text())
    value["train"]["steps"] = steps
    recipe.write_text(json.dumps(value))


def disturb(lab: Lab, kind: str, job: str, draw: random.Random) -> str:
    """The node that is lost, or ""."""
    match kind:
        case "warned":
            lab.run("scancel", "--signal=USR1", "--batch", job)
        case "requeued":
            lab.run("scontrol", "requeue", job)
        case "preempted":
            lab.run("sbatch", "--partition=high", f"--nodes={lab.nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        case "killed":
            lab.run("scancel", "--signal=KILL", f"{job}.{step_of(lab, job)}")
        case _:
            first, *others = lab.run("scontrol", "show", "hostnames", lab.run("squeue", "-h", "-j", job, "-o", "%N")).split()
            node = first if kind.startswith("batch") else draw.choice(others)
            lab.lose(node)
            return node
    return ""


def step_of(lab: Lab, job: str) -> str:
    """The number of the step that srun started."""
    steps = lab.run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
    return next(step.partition(".")[2] for step in steps if step.partition(".")[2].isdecimal())


def differs(recipe: Path, disturbed: Path, undisturbed: Path) -> Any:
    """The first number or weight that is not the same, or None."""
    ended = run_ranks(train, arguments(recipe, undisturbed, TWO), world_size=2, log=undisturbed.with_name("log"))
    if ended.codes != (0, 0):
        return ended.said
    steps = json.loads(recipe.read_text())["train"]["steps"]
    last = Path("checkpoints") / f"step-{steps:08d}"
    if not (disturbed / last).is_dir():
        return f"no {last}"
    if (found := first_difference(numbers(disturbed), numbers(undisturbed))) is not None:
        return found
    return first_difference(sorted(digests(disturbed / last).items()), sorted(digests(undisturbed / last).items()))


if __name__ == "__main__":
    sys.exit(main())
