"""How large a run's checkpoints are, and whether the disk has room for them. No torch."""

from __future__ import annotations

from trainer.checkpoint.folder import CheckpointFolder
from trainer.optimizer_state import states_per_element
from trainer.sections import Recipe

FP32_BYTES = 4


def bytes_of_one(recipe: Recipe, *, trained: int, frozen_bytes: int = 0) -> int:
    """Of one checkpoint: `trained` elements with their moments in fp32, and what is only held as it is held."""
    return frozen_bytes + trained * FP32_BYTES * (1 + states_per_element(recipe.optimizer))


def room(recipe: Recipe, folder: CheckpointFolder, one: int) -> str:
    """A line: how often the run saves, `one` checkpoint's bytes, and what is free; it begins with "warning: " where those that
    are kept do not fit."""
    keys = recipe.checkpoint
    if not keys.every:
        return "checkpoints: none (checkpoint.every = 0): the run cannot be resumed"
    need = one * max(0, keys.keep + 1 - len(folder.steps()))  # a new one is written before the oldest goes
    free = folder.free_bytes()
    line = f"checkpoints: every {keys.every} steps, {keys.keep} kept, {_size(one)} each"
    if need <= free:
        return f"{line}; {_size(free)} free"
    return (
        f"warning: {line}: {folder.path} needs {_size(need)} and has {_size(free)} free; make room, lower "
        "checkpoint.keep, or set run.dir to another disk: what does not fit is not saved"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
