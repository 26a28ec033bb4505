"""Save at each step, resume from each, run to the end: is it, to the bit, the undisturbed run?

    python -m tools.campaign.exactness --steps 60 --dtypes fp32 bf16

Dropout is on. A case is a layout, a format and the step resumed from. It passes if every later
step's loss, gradient norm, learning rate, loss scale and number of targets, and at the end every
weight and moment, are the same bits.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.campaign.cases import WAYS, Way, arguments, digests, first_difference, numbers, remembered, report, write_recipe
from tools.campaign.ranks import run_ranks, train

Body = Callable[[Sequence[str]], int]


def run(way: Way, dtype: str, steps: int, stride: int, folder: Path, *, resumed: Body = train, **more: Any) -> tuple[int, int]:
    """Return (exact, all) cases. `resumed`: what the ranks that go on run. `more`: sections of the
    recipe."""
    keys = (f"precision.dtype={dtype}",)
    recipe = write_recipe(folder, steps=steps, every=1, keep=steps + 1, **more)
    whole = folder / "whole"
    ended = run_ranks(train, arguments(recipe, whole, way, *keys), world_size=way.processes, log=folder / "log")
    if any(ended.codes):
        raise RuntimeError(f"{way.name}: {ended.said}")
    end = whole / "checkpoints" / f"step-{steps:08d}"
    expected = numbers(whole), digests(end), remembered(end)
    exact = total = 0
    for step in range(1, steps, stride):
        again = folder / f"from-{step}"
        source = str(whole / "checkpoints" / f"step-{step:08d}")
        command = arguments(recipe, again, way, *keys, f"checkpoint.every={steps}", resume=source)
        ended = run_ranks(resumed, command, world_size=way.processes, log=folder / "log")
        outcome = {"codes": ended.codes, "first_difference": ended.said[-500:]}
        last = again / "checkpoints" / f"step-{steps:08d}"
        if not any(ended.codes) and last.is_dir():
            got = numbers(again), digests(last), remembered(last)
            outcome["first_difference"] = (
                first_difference(got[0], expected[0][step:])
                or first_difference(sorted(got[1].items()), sorted(expected[1].items()))
                or first_difference(sorted(got[2].items(), key=str), sorted(expected[2].items(), key=str))
            )
        same = outcome["first_difference"] is None
        exact, total = exact + same, total + 1
        if not same:
            report(campaign="exactness", layout=way.name, dtype=dtype, step=step, exact=same, **outcome)
        shutil.rmtree(again, ignore_errors=True)
    report(campaign="exactness", layout=way.name, dtype=dtype, steps=steps, exact=exact, n=total)
    return exact, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stride", type=int, default=1, help="resume from every STRIDE-th step")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--layouts", nargs="+", default=[way.name for way in WAYS])
    options = parser.parse_args()
    exact = total = 0
    for dtype in options.dtypes:
        for way in (way for way in WAYS if way.name in options.layouts):
            with tempfile.TemporaryDirectory(prefix="triaxis-exactness-") as folder:
                passed, cases = run(way, dtype, options.steps, options.stride, Path(folder))
                exact, total = exact + passed, total + cases
    report(campaign="exactness", exact=exact, n=total)
    return int(exact < total)


if __name__ == "__main__":
    raise SystemExit(main())
