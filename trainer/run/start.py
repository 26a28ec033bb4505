"""The start of a run: its folder, and step 0 or a checkpoint to continue from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.messages import Messages
from trainer.checkpoint.best import Contest
from trainer.checkpoint.facts import refusals
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.resume import Found, examine, newest_whole
from trainer.checkpoint.resume_check import Resume, checkpoint_named, rules_begun_with
from trainer.cluster.lease import JobStart, leased
from trainer.engine.compute_format import format_of_devices
from trainer.errors import DataError, RecipeError
from trainer.recipe import ResolvedRecipe
from trainer.recipe.earlier import as_begun
from trainer.recipe.task_defaults import FORMAT, ORIGIN
from trainer.run_folder import RunFolder, read_resolved
from trainer.schema import Recipe
from trainer.track.jsonl import read_metrics


def claim(folder: RunFolder, resume: Resume, sources: Sequence[Path] = ()) -> list[str]:
    """Take the run folder, on the first rank; return remarks.

    RecipeError or DataError where this would write over another run, or over files of no run.
    `sources`: the files of the recipe.
    """
    remarks = []
    if folder.holds_a_run:
        if resume.how == "never":
            with leased(folder.path, JobStart()):
                remarks.append(f"the run that was in {folder.path} is now in {folder.move_aside()}")
        elif resume.path is not None:
            _require_own(folder, checkpoint_named(resume.path))
    elif there := [path for path in (*folder.replaced_whole, *_written_over(folder, sources)) if path.exists()]:
        raise RecipeError(
            f"run folder {folder.path}: {there[0].name} is in it, which a run would write over, but no run (metrics.jsonl): "
            "give a new folder"
        )
    folder.create()
    return remarks


def _written_over(folder: RunFolder, sources: Sequence[Path]) -> list[Path]:
    """Return the recipe's own files that are where the run will write its copy."""
    copies = {(folder.path / "recipe.json").resolve(), folder.resolved.resolve()}
    return [source for source in sources if source.resolve() in copies]


def begin_again(folder: RunFolder, resume: Resume) -> list[str]:
    """Check that a run without a checkpoint may begin again at step 0; return remarks.

    It is called when nobody else writes in the folder. RecipeError or DataError when the run may
    not begin again.
    """
    checkpoints = CheckpointFolder(folder.checkpoints)
    if resume.path is not None or not folder.holds_a_run or checkpoints.steps() or checkpoints.set_aside_ones():
        return []
    if foreign := checkpoints.foreign():
        raise DataError(
            f"{foreign[0]}: it is among the checkpoints of a run that has none, and has no checkpoint's name (step-00000100): "
            "give it its name back, or remove it; or choose another run.name (--set run.name=NAME)"
        )
    _require_restartable(folder)
    return ["the run was ended before its first checkpoint: it begins again at step 0"]


def keep_rules(
    resolved: ResolvedRecipe, folder: RunFolder, resume: Resume, messages: Messages
) -> tuple[ResolvedRecipe, list[str]]:
    """Return the recipe with the rules of the run that it continues, where it leaves them open, and
    remarks. All ranks must call it together."""
    begun = messages.broadcast(rules_begun_with(folder, resume) if messages.is_first else None)
    return (resolved, []) if begun is None else as_begun(resolved, *begun)


def settle_format(resolved: ResolvedRecipe, device: torch.device, messages: Messages) -> tuple[ResolvedRecipe, list[str]]:
    """Return the recipe in the compute format of the devices, where it is still open, and remarks.
    All ranks must call it together."""
    if resolved.origins[FORMAT] != ORIGIN:
        return resolved, []
    of_devices = format_of_devices(device, messages)
    kept = resolved.settled(of_devices).recipe.precision.settled
    told = [f"{FORMAT} stays {kept}, with which the run began; on these devices it would now begin with {of_devices}"]
    return resolved.settled(of_devices), told if kept != of_devices else []


def find(folder: RunFolder, resume: Resume, messages: Messages) -> tuple[Found | None, list[str]]:
    """Return the whole checkpoint to continue from, and remarks. DataError, on all ranks, when none
    is left. All ranks must call it together."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    if resume.how == "never":
        return None, []
    if resume.path is None:
        return newest_whole(checkpoints, messages)
    path = Path(messages.broadcast(str(checkpoint_named(resume.path)) if messages.is_first else None))
    return Found(path, examine(path, messages)), []


def agree(found: Found, facts: Mapping[str, Any], resume: Resume) -> None:
    """Raise RecipeError when this run must not continue from that checkpoint."""
    if lines := refusals(str(found.path), found.manifest.step, found.manifest.facts, facts, resume.allowed):
        raise RecipeError(lines)


def leave_behind(found: Found, folder: RunFolder) -> list[str]:
    """Set aside the checkpoints that are newer than the one to continue from, on the first rank;
    return remarks."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    newer = [path for step, path in checkpoints.steps() if step > found.manifest.step]
    return [
        f"{path.name} is newer than what the run goes on from: set aside as "
        f"{checkpoints.set_aside(path, 'superseded', f'the run went on from {found.path}').name}"
        for path in newer
    ]


def make_room(folder: RunFolder, recipe: Recipe, evaluated_on: str) -> list[str]:
    """Remove, on the first rank, the checkpoints that a run does not keep; return remarks.

    A start that was killed after its last save may not have removed the checkpoint that the save
    replaced. Called when the newest checkpoint is known to be whole.
    """
    checkpoints, contest = CheckpointFolder(folder.checkpoints), Contest.of(recipe, evaluated_on)
    try:
        best = contest.best(checkpoints) if contest else None
        gone = checkpoints.prune(recipe.checkpoint.keep, spared=[best.step] if best else [])
        return [f"{path.name} was to be removed before the run was ended" for path in gone]
    except OSError as error:
        return [f"warning: older checkpoints stay: {error}; the next save removes them"]


def _require_own(folder: RunFolder, checkpoint: Path) -> None:
    if checkpoint.resolve().parent != folder.checkpoints.resolve():
        raise RecipeError(
            f"run folder {folder.path} already holds a run, and {checkpoint} is not a checkpoint of it: choose another "
            "run.name (--set run.name=NAME)"
        )


def _require_restartable(folder: RunFolder) -> None:
    """Raise an error unless the run may begin again at step 0.

    A run without a checkpoint may do so if it was ended before its first save, or during it.
    """
    every = _saved_every(folder)
    last_step = max((int(record["step"] or 0) for record in read_metrics(folder.metrics)), default=0)
    choose = f"choose another run.name (--set run.name=NAME), or --resume never, which moves {folder.path} aside"
    if not last_step:
        return
    if not every:
        raise RecipeError(f"run folder {folder.path} already holds a run, which kept no checkpoints: {choose}")
    # The first save may still be running until the second begins, after that step is logged.
    if last_step > 2 * every:
        raise DataError(
            f"{folder.checkpoints}: no checkpoint is there, though the run reached step {last_step} and saves every {every}: "
            f"bring the folder back (is its disk mounted?), or {choose}"
        )


def _saved_every(folder: RunFolder) -> int:
    """Return checkpoint.every of the run in the folder; 0 where it is not known."""
    try:
        return int(read_resolved(folder.resolved)["values"]["checkpoint.every"]["value"])
    except (RecipeError, DataError, KeyError):
        return 0
