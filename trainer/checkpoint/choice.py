"""The choice of the checkpoint whose weights a command uses, where it is given a whole run. No
torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.best import Contest
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.checkpoint.resume_check import checkpoint_named
from trainer.errors import DataError, RecipeError
from trainer.track.text import short


@dataclass(frozen=True)
class Choice:
    """A checkpoint, and why it is this one: "" where there was no choice."""

    path: Path
    why: str = ""


def weights_of(name: str, *, option: str, also: str = "", last: bool = False) -> Choice:
    """Return the checkpoint that a command line names: its folder, or a run's, which stands for the
    best one if the run has checkpoint.best, and else for the newest.

    `last`: the newest in any case. RecipeError where there is none; `also`: what else is legal
    there.
    """
    newest = checkpoint_named(name, option=option, also=also)
    if (Path(name) / MANIFEST).exists():
        if last:
            raise RecipeError(f"--last chooses a run's newest checkpoint, and {name} is one checkpoint: leave it out")
        return Choice(newest)
    folder = CheckpointFolder(newest.parent)
    contest = Contest.of_folder(folder)
    if contest is None:
        return Choice(newest)
    best, figure = contest.best(folder), contest.aim.figure
    newest_step = folder.steps()[0][0]
    if best is None:
        return Choice(newest, f"step {newest_step}, the newest: no checkpoint has a finite {figure}")
    its_own = short(_figure(contest, newest), 5)
    if last:
        return Choice(
            newest,
            f"step {newest_step}, the newest, with {figure} {its_own}; the best, step {best.step}, has {short(best.value, 5)}",
        )
    other = "it is the newest" if best.step == newest_step else f"the newest, step {newest_step}, has {its_own}"
    return Choice(folder.of_step(best.step), f"step {best.step}, the best {figure} {short(best.value, 5)}; {other}")


def _figure(contest: Contest, checkpoint: Path) -> float | None:
    try:
        return contest.figure(Manifest.read(checkpoint))
    except DataError:
        return None
