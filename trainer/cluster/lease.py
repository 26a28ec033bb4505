"""The lock that allows one start of a run at a time in its folder, and its handover to the next
start of the same SLURM job. No torch.

SLURM takes a node whose daemon has ended for DOWN and starts its jobs anew elsewhere, while the
ranks there live on and hold the folder. So the new start writes that it wants the folder, and
waits; the old one looks before each step, saves, and ends.

    .lock          held by the first rank's process; the system releases it however the process ends
    .holder.json   the start that holds the folder
    .wanted.json   the start that waits for it

The lock decides who may write: before it has the lock, a start writes nothing but `.wanted.json`.
Where a file system's locks do not work across nodes, the new start does not wait; then
`.holder.json` is no longer the old one's, and it writes nothing more.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_REQUEUE, RecipeError, UserError
from trainer.files.durable import write_json
from trainer.files.locks import Lock
from trainer.files.reading import read_json
from trainer.launch.environment import job_name
from trainer.run_folder import LOCK

HOLDER, WANTED = ".holder.json", ".wanted.json"
PATIENCE_S = 5.0  # an ended run's last rank may still be closing its files


class StillLeased(UserError):
    """The error that an earlier start of this job does not release the run folder. The next start
    may find it free."""

    exit_code = EXIT_REQUEUE


@dataclass(frozen=True)
class JobStart:
    """A start of a SLURM job. `job`: "" outside of SLURM. `restarts`: how often SLURM had queued it
    again by then."""

    job: str = ""
    restarts: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> JobStart:
        count = environment.get("SLURM_RESTART_COUNT", "")
        return cls(job_name(environment), int(count) if count.isascii() and count.isdecimal() else 0)

    def follows(self, earlier: JobStart) -> bool:
        return bool(self.job) and self.job == earlier.job and self.restarts > earlier.restarts


@dataclass(frozen=True)
class Lease:
    """A run folder that this start holds. `mark`: identifies `.holder.json` as it wrote it."""

    folder: Path
    start: JobStart
    mark: tuple[int, int]

    @property
    def is_wanted(self) -> bool:
        """Return whether a later start of this job waits for the folder."""
        if not self.start.job or not (self.folder / WANTED).exists():
            return False
        waiting = _start_in(_read(self.folder / WANTED))
        return waiting is not None and waiting.follows(self.start)

    @property
    def is_lost(self) -> bool:
        """Return whether a later start has taken the folder over, with or without the lock."""
        if not self.start.job:
            return False
        try:
            if _mark(self.folder / HOLDER) == self.mark:
                return False
        except OSError:
            return False
        holder = _start_in(_read(self.folder / HOLDER))
        return holder is not None and holder.follows(self.start)


@contextmanager
def leased(
    folder: Path, start: JobStart, *, patience_s: float = 0.0, say: Callable[[str], object] | None = None
) -> Iterator[Lease]:
    """Hold the folder inside the context, so that only this process writes in it.

    An earlier start of the same job is asked to release it, and has `patience_s` for that.
    StillLeased if it does not. RecipeError if another run holds it: two runs in one folder would
    overwrite each other's history and checkpoints.
    """
    lock = Lock(folder / LOCK)
    if not lock.acquired(PATIENCE_S):
        _ask_for(folder, start, patience_s, say or _on_stderr)
        if not lock.acquired(patience_s):
            raise StillLeased(
                f"{_told(folder)} and have not ended {patience_s:.0f} s after they were asked to: end them there (scancel does "
                "not reach them)"
            )
    try:
        (folder / WANTED).unlink(missing_ok=True)
        write_json(
            folder / HOLDER, {"job": start.job, "restarts": start.restarts, "host": socket.gethostname(), "pid": os.getpid()}
        )
        yield Lease(folder, start, _mark(folder / HOLDER))
    finally:
        lock.release()


def _ask_for(folder: Path, start: JobStart, patience_s: float, say: Callable[[str], object]) -> None:
    holder = _start_in(_read(folder / HOLDER))
    if holder is None or not start.follows(holder):
        raise RecipeError(
            f"run folder {folder}: another process is training in it: end that one first, or choose another run.name"
        )
    write_json(folder / WANTED, {"job": start.job, "restarts": start.restarts})
    say(f"{_told(folder)}: they are asked to save and end; waiting for at most {patience_s:.0f} s")


def _told(folder: Path) -> str:
    holder = _read(folder / HOLDER)
    where = f"host {holder.get('host')}, process {holder.get('pid')}"
    return f"run folder {folder}: the ranks of this job's earlier start live on ({where}), though SLURM has started it again,"


def _on_stderr(line: str) -> None:
    sys.stderr.write(f"triaxis: {line}\n")
    sys.stderr.flush()


def _mark(path: Path) -> tuple[int, int]:
    """Return an identifier of the file at a path: the number of a deleted file may be used again,
    its time not."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    """Return the content, or {} if it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _start_in(words: Mapping[str, Any]) -> JobStart | None:
    job, restarts = words.get("job"), words.get("restarts")
    return JobStart(job, restarts) if isinstance(job, str) and isinstance(restarts, int) else None
