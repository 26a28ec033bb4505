"""The folder of a run's checkpoints: names, drafts, the rename that commits, what is kept, what is
set aside. No torch.

    step-00000100/             a checkpoint: manifest.json, rank-00000.safetensors …, hugging_face/
    step-00000090.damaged/     set aside, with the reason in reason.txt; never read again
    .step-00000110.draft/      being written; one left by a crash is removed by the next save

A checkpoint exists from the rename of its draft, which is completely written and on disk by then.
No file points to the newest one, so no such pointer can be torn.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.checkpoint.manifest import MANIFEST
from trainer.errors import DataError
from trainer.files.durable import make_private, private_file, remove, sync_folder

STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
HUGGING_FACE = "hugging_face"  # config.json, tokenizer and code: what an export adds to the weights
REASON = "reason.txt"


class CheckpointFolder:
    """A folder of checkpoints. Only one process may write in it: the run's first rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of every checkpoint that has its final name, the newest first.

        A link to one on another disk is followed. DataError for such a name that is not a folder.
        """
        found = [(int(match.group(1)), self.path / name) for name in self._names() if (match := STEP.fullmatch(name))]
        for _, path in found:
            if not path.is_dir():
                what = "a link to what is not there: is its disk mounted?" if path.is_symlink() else "no folder"
                raise DataError(f"{path}: it has a checkpoint's name and is {what}; bring it back, or remove it")
        return sorted(found, reverse=True)

    def foreign(self) -> list[Path]:
        """Return the entries whose names are not ours."""
        ours = re.compile(rf"{STEP.pattern}(\..*)?|\.step-.*", re.ASCII)
        return [self.path / name for name in self._names() if not ours.fullmatch(name)]

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def set_aside_ones(self) -> list[Path]:
        """Return the folders that once were checkpoints."""
        return sorted(path for path in self.path.glob("step-*.*") if path.is_dir())

    def of_step(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """Create a new empty draft, and remove those that a crash left."""
        make_private(self.path)
        for left in self.path.glob(".step-*"):
            remove(left)
        draft = self.path / f".step-{step:08d}.draft"
        draft.mkdir(mode=0o700)
        return draft

    def commit(self, draft: Path, step: int, manifest: bytes) -> Path:
        """Write the manifest last, make all names durable, and give the draft its final name."""
        with private_file(draft / MANIFEST, must_be_new=True) as file:
            file.write(manifest)
        for folder in (path for path in draft.rglob("*") if path.is_dir()):
            sync_folder(folder)
        sync_folder(draft)
        final = self.of_step(step)
        os.rename(draft, final)
        try:
            sync_folder(self.path)
        except OSError:
            os.rename(final, draft)  # the new name might not survive a crash, so take it back
            raise
        return final

    def set_aside(self, checkpoint: Path, word: str, reason: str) -> Path:
        """Exclude a checkpoint for good: rename it to `step-00000090.WORD`, with the reason
        inside."""
        names = (f"{checkpoint.name}.{word}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
        aside = next(self.path / name for name in names if not os.path.lexists(self.path / name))
        os.rename(checkpoint, aside)
        remove(aside / REASON)  # it may be a planted link to some other file
        with private_file(aside / REASON, must_be_new=True) as file:
            file.write(f"{reason}\n".encode())
        sync_folder(self.path)
        return aside

    def surplus(self, keep: int, spared: Collection[int] = ()) -> list[tuple[int, Path]]:
        """Return (step, folder) of all but the newest `keep` and those of the `spared` steps."""
        return [(step, path) for step, path in self.steps()[keep:] if step not in spared]

    def prune(self, keep: int, spared: Collection[int] = ()) -> list[Path]:
        """Remove the surplus, and what a crash left of removing others; return the removed ones.

        Each is renamed before its first file goes, so that it no longer counts as a checkpoint.
        """
        gone = []
        for left in self.path.glob(".step-*.removed"):
            remove(left)
        for step, path in self.surplus(keep, spared):
            doomed = self.path / f".step-{step:08d}.removed"
            os.rename(path, doomed)
            sync_folder(self.path)
            remove(doomed)
            gone.append(path)
        return gone

    def free_bytes(self) -> int:
        """Return the free bytes of the disk that the folder is on, or will be."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free


def files_in(checkpoint: Path) -> Iterator[str]:
    """Yield the names of everything in a checkpoint except folders, relative to it. Links are not
    followed."""
    for folder, folders, files in os.walk(checkpoint):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(folder) / name).relative_to(checkpoint).as_posix()
