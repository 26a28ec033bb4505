"""Save in one layout, go on in another: the same bits after loading, and the same training.

    python -m tools.campaign.reshard

All ordered pairs of the eight layouts are tried. A case passes if the checkpoint that the second
run could write right after loading has, tensor for tensor and state for state, the bits of the one
it loaded, and the losses of the following steps are those of the first layout's own within 2e-6
(fp32 sums in another order).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.campaign.cases import WAYS, Way, arguments, digests, first_difference, report, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.resume_check import Resume
from trainer.recipe import load
from trainer.run.session import open_session
from trainer.track import read_metrics

SAVED_AT = 10
LOSS_TOLERANCE = 2e-6  # relative; sums over ranks are taken in another order


def prepare(way: Way, recipe: Path, folder: Path, steps: int) -> Path:
    """Make a run in this layout with a checkpoint at SAVED_AT, continued to the end."""
    run = folder / way.name
    ended = run_ranks(train, arguments(recipe, run, way), world_size=way.processes, log=folder / "log")
    if any(ended.codes):
        raise RuntimeError(f"{way.name}: {ended.said}")
    assert len(read_metrics(run / "metrics.jsonl")) == steps
    return run


def save_again(recipe: str, run_dir: str, keys: Sequence[str], checkpoint: str) -> int:
    """Load a checkpoint on this rank and save it, without a step between."""
    with open_session(load(recipe, keys), run_dir, Resume(checkpoint)) as run:
        run.checkpoints.save(run.checkpoints.start_step, run.engine, {}, {})
        run.checkpoints.wait()
    return 0


def load_and_save(way: Way, recipe: Path, run: Path, checkpoint: Path, *, log: Path) -> Ended:
    """Run `save_again` on all ranks of a layout."""
    return run_ranks(save_again, str(recipe), str(run), way.keys, str(checkpoint), world_size=way.processes, log=log)


def compare(source: Path, way: Way, recipe: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Go on from `source`'s checkpoint in another layout, and compare tensors after loading, and
    losses after that."""
    checkpoint, again = source / "checkpoints" / f"step-{SAVED_AT:08d}", folder / f"{source.name}-to-{way.name}"
    ended = load_and_save(way, recipe, again, checkpoint, log=folder / "log")
    if any(ended.codes):
        return {"same_tensors": False, "said": ended.said[-500:]}
    loaded, saved = digests(again / "checkpoints" / checkpoint.name), digests(checkpoint)
    ended = run_ranks(train, arguments(recipe, again, way), world_size=way.processes, log=folder / "log")
    if any(ended.codes):
        return {"same_tensors": False, "said": ended.said[-500:]}
    ours = {r["step"]: float(r["loss"] or 0) for r in read_metrics(again / "metrics.jsonl")}
    theirs = {r["step"]: float(r["loss"] or 0) for r in read_metrics(source / "metrics.jsonl") if (r["step"] or 0) > SAVED_AT}
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    return {
        "same_tensors": first_difference(sorted(loaded.items()), sorted(saved.items())) is None,
        "tensors": len(saved),
        "loss_difference": max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs),
        "steps": len(theirs),
    }


def run(names: list[str], steps: int, folder: Path) -> tuple[int, int]:
    """Return (passed, all) ordered pairs."""
    ways = [way for way in WAYS if way.name in names]
    recipe = write_recipe(folder, steps=steps, every=SAVED_AT, keep=steps)
    runs = {way.name: prepare(way, recipe, folder, steps) for way in ways}
    passed = total = 0
    worst = 0.0
    for source in ways:
        for target in ways:
            if source is target:
                continue
            outcome = compare(runs[source.name], target, recipe, folder, steps)
            good = outcome["same_tensors"] and outcome["loss_difference"] <= LOSS_TOLERANCE
            passed, total = passed + good, total + 1
            worst = max(worst, outcome.get("loss_difference", float("inf")))
            report(campaign="reshard", source=source.name, target=target.name, passed=good, **outcome)
    report(campaign="reshard", passed=passed, n=total, worst_loss_difference=worst)
    return passed, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help=f"of which {SAVED_AT} come before the change")
    parser.add_argument("--layouts", nargs="+", default=[way.name for way in WAYS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="triaxis-reshard-") as folder:
        passed, total = run(options.layouts, options.steps, Path(folder))
    return int(passed < total)


if __name__ == "__main__":
    raise SystemExit(main())
