"""One start of a run at a time in its folder, and how it is handed over to the next start of the same SLURM job. No torch.

A node whose daemon has ended is DOWN to SLURM, which starts its jobs anew elsewhere; the ranks there live on, and hold the
folder. So the new start leaves word that it wants it, and waits; the old one looks before each step, saves, and ends.

    .lock          of the first rank's process; the system lets go of it when that ends, however it ends
    .holder.json   whose it is
    .wanted.json   the start that waits for it

The lock says who may write: all that a start writes before it has it is that word. Where a file system's locks do not reach
from node to node the new start would not wait; then `.holder.json` is no longer the old one's, and it writes nothing more.
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

LOCK, HOLDER, WANTED = ".lock", ".holder.json", ".wanted.json"
PATIENCE_S = 5.0  # an ended run's last rank may still be closing its files


class StillHeld(UserError):
    """An earlier start of this job does not let go of the run folder; the next one may find it gone."""

    exit_code = EXIT_REQUEUE


@dataclass(frozen=True)
class JobStart:
    """`job` "" outside of SLURM. `restarts`: how often SLURM had queued it again by then."""

    job: str = ""
    restarts: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> JobStart:
        count = environment.get("SLURM_RESTART_COUNT", "")
        return cls(job_name(environment), int(count) if count.isascii() and count.isdecimal() else 0)

    def follows(self, earlier: JobStart) -> bool:
        return bool(self.job) and self.job == earlier.job and self.restarts > earlier.restarts


@dataclass(frozen=True)
class Hold:
    """A run folder that is this start's; `mark`: of `.holder.json` as it wrote it."""

    folder: Path
    start: JobStart
    mark: tuple[int, int]

    @property
    def is_wanted(self) -> bool:
        """Whether a later start of this job waits for the folder."""
        if not self.start.job or not (self.folder / WANTED).exists():
            return False
        waiting = _start_in(_read(self.folder / WANTED))
        return waiting is not None and waiting.follows(self.start)

    @property
    def is_lost(self) -> bool:
        """Whether a later start has taken the folder over, lock or no lock."""
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
def held(
    folder: Path, start: JobStart, *, patience_s: float = 0.0, say: Callable[[str], object] | None = None
) -> Iterator[Hold]:
    """This process alone writes in the folder for the block. An earlier start of the same job is asked to give it up, and has
    `patience_s` to.

    RecipeError when another run has it: two runs in one folder would write over each other's history and checkpoints.
    StillHeld when the earlier start does not give it up.
    """
    lock = Lock(folder / LOCK)
    if not lock.acquired(PATIENCE_S):
        _ask_for(folder, start, patience_s, say or _on_stderr)
        if not lock.acquired(patience_s):
            raise StillHeld(
                f"{_told(folder)} and have not ended {patience_s:.0f} s after they were asked to: end them there (scancel does "
                "not reach them)"
            )
    try:
        (folder / WANTED).unlink(missing_ok=True)
        write_json(
            folder / HOLDER, {"job": start.job, "restarts": start.restarts, "host": socket.gethostname(), "pid": os.getpid()}
        )
        yield Hold(folder, start, _mark(folder / HOLDER))
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
    """Another one for each file that was put there: the number of one that is gone may come again, its time does not."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    """{} when it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _start_in(words: Mapping[str, Any]) -> JobStart | None:
    job, restarts = words.get("job"), words.get("restarts")
    return JobStart(job, restarts) if isinstance(job, str) and isinstance(restarts, int) else None
