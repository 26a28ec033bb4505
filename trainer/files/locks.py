"""Locks between processes: files that the system locks, and lets go of when their holder ends, however it ends. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import RecipeError
from trainer.files.reading import told


class Lock:
    """One lock; `path`: its file, which stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Where a file system has no locks, a file that is there would stand for one, and stay when its holder is killed.
        self._lock = FileLock(path, mode=0o600, fallback_to_soft=False)

    def acquired(self, patience_s: float) -> bool:
        """Whether it is this process's, after waiting for at most so long. RecipeError where no lock can be made."""
        try:
            self._lock.acquire(timeout=patience_s)
        except Timeout:
            return False
        except OSError as error:
            raise RecipeError(
                f"{self._path}: no lock can be made there: {told(error)}: remove what is there, or name a folder on a disk "
                "that has locks"
            ) from error
        return True

    def release(self) -> None:
        self._lock.release()

    @contextmanager
    def held(self, waiting: Callable[[], object] = lambda: None, *, every_s: float = 30.0) -> Iterator[None]:
        """Around what one process does at a time; while another does it, `waiting` is called now and then."""
        patience_s = 0.0
        while not self.acquired(patience_s):
            waiting()
            patience_s = every_s
        try:
            yield
        finally:
            self.release()
