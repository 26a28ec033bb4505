"""A signal on one rank at any moment: all ranks save the same step, and the restarted run is exact.

    python -m tools.campaign.signals --cases 200

The exit code must be 75, and the restarted run must be, to the bit, the undisturbed one. Moments
are drawn over the whole life of a run: before the process group exists, while weights are made, in
a step, in an evaluation, in a save; a third of the cases sends the signal twice, to two ranks.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.campaign.cases import WAYS, Way, arguments, digests, first_difference, numbers, report, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.errors import EXIT_OK, EXIT_REQUEUE
from trainer.launch.stop_request import SIGNALS

STEPS = 40
MOST_STARTS = 4


def whole_run(way: Way, folder: Path) -> tuple[Path, Path, float]:
    """Return (recipe, undisturbed run, its duration [s])."""
    recipe = write_recipe(folder, steps=STEPS, every=7, keep=2, checkpoint={"async": way.processes > 1})
    ended = run_ranks(train, arguments(recipe, folder / "whole", way), world_size=way.processes, log=folder / "log")
    if any(ended.codes):
        raise RuntimeError(f"{way.name}: {ended.said}")
    return recipe, folder / "whole", ended.wall_s


def disturbed(way: Way, recipe: Path, run: Path, duration_s: float, stream: random.Random) -> tuple[list[Ended], list[str]]:
    """Start the run, send signals, start it again until it is done; return how each start ended,
    and what was sent."""
    sent: list[str] = []

    def send(pids: Sequence[int]) -> None:
        time.sleep(stream.uniform(0.0, duration_s))
        for _ in range(1 + (stream.random() < 1 / 3)):
            number, rank = stream.choice(SIGNALS), stream.randrange(len(pids))
            sent.append(f"{signal.Signals(number).name} to rank {rank}")
            try:
                os.kill(pids[rank], number)
            except ProcessLookupError:
                sent[-1] += ", which had ended"

    command = arguments(recipe, run, way)
    ends = [run_ranks(train, command, world_size=way.processes, log=run.parent / "log", around=send)]
    while any(ends[-1].codes) and len(ends) < MOST_STARTS:
        ends.append(run_ranks(train, command, world_size=way.processes, log=run.parent / "log"))
    return ends, sent


def verdict(ends: Sequence[Ended], run: Path, whole: Path) -> str:
    """Return why the case fails, or ""."""
    first, last = ends[0].codes, ends[-1].codes
    by_signal = {-number for number in SIGNALS}  # the signal came before the process could listen
    if set(first) not in ({EXIT_OK}, {EXIT_REQUEUE}) and not by_signal & set(first):
        return f"the first start ended with {first}"
    if any(last):
        return f"the last start ended with {last}: {ends[-1].said[-400:]}"
    if difference := first_difference(numbers(run), numbers(whole)):
        return f"another record: {difference}"
    end = Path("checkpoints") / f"step-{STEPS:08d}"
    return "" if digests(run / end) == digests(whole / end) else "other tensors"


def campaign(cases: int, seed: int, names: Sequence[str]) -> tuple[int, int]:
    """Return (passed, all)."""
    ways = [way for way in WAYS if way.name in names]
    passed = interrupted = 0
    with tempfile.TemporaryDirectory(prefix="triaxis-signals-") as scratch:
        made = {way.name: whole_run(way, Path(scratch) / way.name) for way in ways}
        for case in range(cases):
            stream, way = random.Random(f"{seed} {case}"), ways[case % len(ways)]
            recipe, whole, duration_s = made[way.name]
            run = recipe.parent / f"run-{case}"
            ends, sent = disturbed(way, recipe, run, duration_s, stream)
            reason = verdict(ends, run, whole)
            passed += not reason
            interrupted += EXIT_REQUEUE in ends[0].codes
            if reason:
                report(campaign="signals", case=case, seed=seed, layout=way.name, sent=sent, reason=reason)
            shutil.rmtree(run, ignore_errors=True)
    report(campaign="signals", seed=seed, passed=passed, n=cases, interrupted=interrupted)
    return passed, cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=["one", "dp2-zero1", "pp2", "tp2xpp2"])
    options = parser.parse_args()
    passed, total = campaign(options.cases, options.seed, options.layouts)
    return int(passed < total)


if __name__ == "__main__":
    raise SystemExit(main())
