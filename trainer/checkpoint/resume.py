"""The way from a checkpoint on disk back into a run.

It has two phases. All ranks together read and hash all of the checkpoint, and agree that it is
whole; only then is any tensor set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Return the newest checkpoint that every rank finds whole, and remarks on those set aside on
    the way.

    None if there never was a checkpoint. DataError if there were some and none is whole, because a
    run never starts from scratch by itself. Collective.
    """
    found, remarks = first_whole(folder, messages, lambda: next((path for _, path in folder.steps()), None))
    if found is not None:
        return found, remarks
    lost = messages.broadcast([path.name for path in folder.set_aside_ones()])
    if lost:
        raise DataError(
            *remarks,
            f"{folder.path}: no checkpoint is whole ({', '.join(lost)} set aside, each with its reason.txt): bring back a copy "
            "of one, or start from scratch with --resume never",
        )
    return None, remarks


def first_whole(
    folder: CheckpointFolder, messages: Messages, choose: Callable[[], Path | None]
) -> tuple[Found | None, list[str]]:
    """Return the first chosen checkpoint that every rank finds whole, None if nothing is chosen any
    more, and remarks on those set aside on the way.

    `choose` is called on the first rank, again after each that was set aside. Collective.
    """
    remarks: list[str] = []
    while (chosen := messages.broadcast(_name(choose()) if messages.is_first else None)) is not None:
        path = Path(chosen)
        try:
            return Found(path, examine(path, messages)), remarks
        except DataError as error:
            reason = str(error)
        aside = messages.broadcast(str(folder.set_aside(path, "damaged", reason)) if messages.is_first else None)
        remarks.append(f"warning: checkpoint {path.name} is not used: {reason}; set aside as {Path(aside).name}")
    return None, remarks


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def examine(path: Path, messages: Messages) -> Manifest:
    """Return the manifest of a checkpoint after the ranks have hashed every file, each a share.

    The first rank alone reads the manifest and the names in the folder: where thousands of ranks
    did, the disk would serve nothing else. DataError, the same on all ranks, if anything is wrong.
    Collective.
    """
    said = messages.broadcast(_read(path) if messages.is_first else None)
    if "failure" in said:
        raise DataError(said["failure"])
    manifest, failure = Manifest.from_json(said), ""
    try:
        check_files(path, manifest.files[messages.rank :: messages.size])
    except DataError as error:
        failure = str(error)
    if bad := messages.first(failure):
        raise DataError(bad)
    return manifest


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sound(path).as_json()
    except DataError as error:
        return {"failure": str(error)}


class CheckpointSource:
    """The states of tensors from a checkpoint, for a `ZeroState` that is restored."""

    def __init__(self, found: Found, *, states: Sequence[str]) -> None:
        """Take the states that the optimizer has; others in the checkpoint are left alone."""
        self._reader = Reader(found.path, found.manifest)
        self._states: dict[str, list[str]] = {}
        for name, tensor in found.manifest.tensors.items():
            # a state with a shape of its own is a tensor of its own
            weight, _, own = name.partition(":")
            kept = [state for state in ([own] if own else tensor.dtypes) if state != WEIGHT and state in states]
            self._states.setdefault(weight, []).extend(kept)

    def states(self, name: str) -> Sequence[str]:
        return self._states.get(name, [])

    def read(self, fragment: Fragment, state: str) -> Tensor:
        return self._reader.read(fragment, state)
