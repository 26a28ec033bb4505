"""Going on: which checkpoint, whether it is whole, whether this run may, and setting its tensors.

In two phases: all ranks read and hash all of it, and agree; only then is anything set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from parallel.messages import Messages
from parallel.pieces import Fragment
from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import Reader
from trainer.errors import DataError
from trainer.update_rules import WEIGHT


@dataclass(frozen=True)
class Found:
    """A checkpoint that every rank has found whole."""

    path: Path
    manifest: Manifest


def newest_whole(folder: CheckpointFolder, messages: Messages) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that every rank finds whole, None where there never was one, and what was set aside on the way.

    DataError when there were some and none is whole: a run never starts from scratch by itself. Collective.
    """
    remarks: list[str] = []
    while True:
        steps = folder.steps() if messages.is_first else []
        newest = messages.broadcast(str(steps[0][1]) if steps else None)
        if newest is None:
            break
        path = Path(newest)
        try:
            return Found(path, examine(path, messages)), remarks
        except DataError as error:
            reason = str(error)
        aside = messages.broadcast(str(folder.set_aside(path, "damaged", reason)) if messages.is_first else None)
        remarks.append(f"warning: checkpoint {path.name} is not used: {reason}; set aside as {Path(aside).name}")
    lost = messages.broadcast([path.name for path in folder.set_aside_ones()])
    if lost:
        raise DataError(
            *remarks,
            f"{folder.path}: no checkpoint is whole ({', '.join(lost)} set aside, each with its reason.txt): bring back a copy "
            "of one, or start from scratch with --resume never",
        )
    return None, remarks


def examine(path: Path, messages: Messages) -> Manifest:
    """The manifest of a checkpoint of which the ranks have hashed every file, each a share. DataError, the same on all ranks,
    when anything is wrong. Collective."""
    failure, manifest = "", None
    try:
        manifest = read_sound(path)
        check_files(path, manifest.files[messages.rank :: messages.size])
    except DataError as error:
        failure = str(error)
    if bad := next(filter(None, messages.all(failure)), ""):
        raise DataError(bad)
    assert manifest is not None
    return manifest


class CheckpointSource:
    """A checkpoint as what a `ZeroState` is restored from."""

    def __init__(self, found: Found, *, states: Sequence[str]) -> None:
        """`states`: those that the optimizer has; others in the checkpoint are left alone."""
        self._reader = Reader(found.path, found.manifest)
        self._states: dict[str, list[str]] = {}
        for name, tensor in found.manifest.tensors.items():
            weight, _, own = name.partition(":")  # a state with a shape of its own is a tensor of its own
            kept = [state for state in ([own] if own else tensor.dtypes) if state != WEIGHT and state in states]
            self._states.setdefault(weight, []).extend(kept)

    def states(self, name: str) -> Sequence[str]:
        return self._states.get(name, [])

    def read(self, fragment: Fragment, state: str) -> Tensor:
        return self._reader.read(fragment, state)
