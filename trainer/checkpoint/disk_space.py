"""The size of a run's checkpoints, and whether the disk has room for them. No torch."""

from __future__ import annotations

from typing import NamedTuple

from trainer.checkpoint.folder import CheckpointFolder
from trainer.schema import Recipe
from trainer.update_rules import states_per_element

FP32_BYTES = 4


class DiskSpace(NamedTuple):
    """A line to show, and whether all checkpoints that the run keeps will be there."""

    line: str
    enough: bool


def bytes_of_one(recipe: Recipe, *, trained: int, frozen_bytes: int = 0) -> int:
    """Return the bytes of one checkpoint: `trained` elements with their moments in fp32, and frozen
    ones as they are held."""
    return frozen_bytes + trained * FP32_BYTES * (1 + states_per_element(recipe.optimizer))


def disk_space(recipe: Recipe, folder: CheckpointFolder, one: int) -> DiskSpace:
    """Return how often the run saves, the size of `one` checkpoint [bytes], and the free space."""
    keys = recipe.checkpoint
    if not keys.every:
        return DiskSpace("checkpoints: none (checkpoint.every = 0): the run cannot be resumed", False)
    kept = keys.keep + (keys.best is not None)
    # A new one is written before the oldest goes.
    need = one * max(0, kept + 1 - len(folder.steps()))
    free = folder.free_bytes()
    best = f" and the best by {keys.best}" if keys.best else ""
    line = f"checkpoints: every {keys.every} steps, {keys.keep} kept{best}, {_size(one)} each"
    if need <= free:
        return DiskSpace(f"{line}; {_size(free)} free", True)
    return DiskSpace(
        f"warning: {line}: {folder.path} needs {_size(need)} and has {_size(free)} free; make room, lower "
        "checkpoint.keep, or set run.dir to another disk: what does not fit is not saved",
        False,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
