"""Runs in a real SLURM that are warned, preempted, requeued, killed, out of time and lose nodes,
with nobody's help.

    python -m tools.campaign.preemption --cases 54

Runs of 2 nodes × 1 rank are disturbed --each times in their middle, at a random step, and must come
to their end with the same record, to the byte, as an undisturbed run. Every kind occurs once before
any occurs again, in an order that the seed draws. A JSON line for each case and a summary go to
stdout, a table to stderr; exit 1 if one differs. If something is not done in time, the cases of
that run have failed, and the next run begins.

| kind | what happens |
|---|---|
| warned | USR1 to the script, as `--signal` sends it |
| time over | the time limit comes near: SLURM itself sends that signal |
| requeued | `scontrol requeue` |
| preempted, … with grace | a job of higher priority takes the nodes, at once or after a GraceTime |
| killed | `kill -9` for both ranks |
| node lost, batch node lost | a power cut of the second node, or of the one with the script |
| daemon lost | slurmd of one node ends: the node is DOWN, its rank lives on |
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.campaign.cases import Way, arguments, digests, first_difference, numbers, report, write_recipe
from tools.campaign.ranks import run_ranks, train
from tools.campaign.slurm import Lab, LabError, said, steps_logged
from trainer.cluster.requeue import newest_step
from trainer.run_folder import RunFolder

KINDS = (
    *("warned", "time over", "requeued", "preempted", "preempted with grace"),
    *("killed", "node lost", "batch node lost", "daemon lost"),
)
TWO = Way("dp2", 2)
NO_END = 1_000_000
TO_GO = 200  # steps after the last disturbance: more than a rank takes before it hears of it
PATIENCE_S = 240.0
GRACE_S = 30  # to save in, before the time is over or after the notice of a preemption
PARTITION = "low"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=54)
    parser.add_argument("--each", type=int, default=6, metavar="N", help="cases in one run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after so long")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    # The lab's daemons would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started, cases = time.monotonic(), []
    kinds = mixed(chosen.cases, random.Random(chosen.seed))
    with tempfile.TemporaryDirectory(prefix="triaxis-preemption-") as folder:
        lab = Lab(Path(folder) / "lab", nodes=3)
        try:
            lab.start()
            for begin in range(0, chosen.cases, chosen.each):
                if time.monotonic() - started > chosen.seconds:
                    break
                run = Path(folder) / f"run-{begin}"
                cases += list(unattended(lab, run, kinds[begin : begin + chosen.each], f"{chosen.seed}/{begin}"))
        finally:
            lab.stop()
    identical = sum(case["identical"] for case in cases)
    report(
        summary="preemption",
        seed=chosen.seed,
        n=len(cases),
        identical=identical,
        by_kind={kind: sum(case["kind"] == kind for case in cases) for kind in KINDS},
        human_edits=0,
        steps_done_twice=sum(case["steps_done_twice"] or 0 for case in cases),
        median_s_to_train_again=median(case["s_to_train_again"] for case in cases),
        wall_s=round(time.monotonic() - started),
    )
    print("\n".join(table(cases)), file=sys.stderr)
    return 0 if cases and identical == len(cases) else 1


def mixed(cases: int, draw: random.Random) -> list[str]:
    """Return rounds of all kinds, each in an order of its own."""
    kinds: list[str] = []
    while len(kinds) < cases:
        kinds += draw.sample(KINDS, len(KINDS))
    return kinds[:cases]


def median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 1) if known else None


def table(cases: Sequence[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("kind", "n", "identical", "median s to train again", "median steps done twice")]
    for kind in (*KINDS, "all"):
        of_kind = [case for case in cases if kind in (case["kind"], "all")]
        figures = (median(case[key] for case in of_kind) for key in ("s_to_train_again", "steps_done_twice"))
        shown = ("–" if figure is None else str(figure) for figure in figures)
        rows.append((kind, str(len(of_kind)), str(sum(case["identical"] for case in of_kind)), *shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def unattended(lab: Lab, folder: Path, kinds: list[str], seed: str) -> Iterator[dict[str, Any]]:
    """Run `one_run`. If the lab does not do what it must, all cases of the run have failed, and the
    lab is made ready again."""
    try:
        yield from one_run(lab, folder, kinds, seed)
    except LabError as error:
        report(run=folder.name, seed=seed, kinds=kinds, identical=False, failed=str(error)[-4000:])
        yield from ({"kind": kind, "identical": False, "steps_done_twice": None, "s_to_train_again": None} for kind in kinds)
        lab.clear()


def one_run(lab: Lab, folder: Path, kinds: list[str], seed: str) -> Iterator[dict[str, Any]]:
    """A run that is disturbed in each of these ways, and then told where its end is."""
    draw = random.Random(seed)
    recipe = write_recipe(folder, steps=NO_END, every=20, keep=2, schedule={"name": "constant", "warmup_steps": 4})
    run_dir = folder / "disturbed"
    words = ("--template", "preemptible", "--grace", str(GRACE_S))
    job = lab.submit(recipe, run_dir, *words, nodes=2, ranks=1, partition=PARTITION)
    cases = []
    for number, kind in enumerate(kinds):
        trains(lab, run_dir)
        time.sleep(draw.random() * 2)
        step, restarts = steps_logged(run_dir), lab.job(job).restarts
        begun = time.monotonic()
        lost = disturb(lab, kind, job, draw)
        queued_again(lab, job, restarts, f"{kind}: queued again\n{said(run_dir)}")
        if number == len(kinds) - 1:
            set_end(recipe, steps_logged(run_dir) + TO_GO)  # SLURM will start it in some seconds
        mend(lab, kind, job, lost)
        lab.until(lambda: lab.job(job).state == "RUNNING", PATIENCE_S, f"{kind}: runs again\n{said(run_dir)}")
        went_on = newest_step(RunFolder(run_dir))  # its ranks have not saved yet
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
        report(**case, run=folder.name, seed=seed, restarts=ended.restarts, identical=identical)
        yield {**case, "identical": identical}
    if not identical:
        report(run=folder.name, state=ended.state, exit_code=ended.exit_code, difference=difference, said=said(run_dir)[-4000:])


def queued_again(lab: Lab, job: str, restarts: int, what: str) -> None:
    lab.until(lambda: lab.job(job).restarts > restarts, PATIENCE_S, what)


def trains(lab: Lab, run_dir: Path, job: str | None = None) -> None:
    """Wait until the history grows (a run that goes on first cuts it), or the job has ended
    already."""
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
    """Disturb the job, and return the node that is lost, or ""."""
    match kind:
        case "warned":
            lab.run("scancel", "--signal=USR1", "--batch", job)
        case "time over":
            lab.bring_the_end_near(job, GRACE_S)
        case "requeued":
            lab.run("scontrol", "requeue", job)
        case "preempted" | "preempted with grace":
            lab.give_grace(PARTITION, GRACE_S if kind.endswith("grace") else 0)
            lab.preempt()
        case "killed":
            lab.run("scancel", "--signal=KILL", f"{job}.{step_of(lab, job)}")
        case _:
            first, *others = lab.nodes_of(job)
            if kind == "daemon lost":
                node = draw.choice([first, *others])
                lab.silence(node)
            else:
                node = first if kind.startswith("batch") else draw.choice(others)
                lab.lose(node)
            return node
    return ""


def mend(lab: Lab, kind: str, job: str, lost: str) -> None:
    """Restore everything except the run."""
    if lost:
        lab.bring_back(lost)
    if kind == "time over":
        lab.limit(job, minutes=30)
    if kind == "preempted with grace":
        lab.give_grace(PARTITION, 0)


def step_of(lab: Lab, job: str) -> str:
    """Return the number of the step that srun started."""
    steps = lab.run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
    return next(step.partition(".")[2] for step in steps if step.partition(".")[2].isdecimal())


def differs(recipe: Path, disturbed: Path, undisturbed: Path) -> Any:
    """Return the first number or weight that is not the same, or None."""
    steps = json.loads(recipe.read_text())["train"]["steps"]
    words, log = arguments(recipe, undisturbed, TWO), undisturbed.with_name("log")
    # A step takes milliseconds, but the disturbed run's life decides how many there are.
    ended = run_ranks(train, words, world_size=2, log=log, timeout_s=120.0 + 0.5 * steps)
    if ended.codes != (0, 0):
        return ended.said
    last = Path("checkpoints") / f"step-{steps:08d}"
    if not (disturbed / last).is_dir():
        return f"no {last}"
    if (found := first_difference(numbers(disturbed), numbers(undisturbed))) is not None:
        return found
    return first_difference(sorted(digests(disturbed / last).items()), sorted(digests(undisturbed / last).items()))


if __name__ == "__main__":
    sys.exit(main())
