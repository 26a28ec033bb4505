"""Locks between processes: files that the system locks, and releases when their holder ends in any
way. No torch."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import RecipeError
from trainer.files.reading import told


class Lock:
    """A lock. `path`: its file, which stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # On a file system without locks the fallback would be a file that exists, which a killed
        # holder would leave behind.
        self._lock = FileLock(path, mode=0o600, fallback_to_soft=False)

    def acquired(self, patience_s: float) -> bool:
        """Return whether this process has the lock, after waiting for at most `patience_s`.
        RecipeError if no lock can be made."""
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
        """Hold the lock inside the context. While another process has it, `waiting` is called now
        and then."""
        patience_s = 0.0
        while not self.acquired(patience_s):
            waiting()
            patience_s = every_s
        try:
            yield
        finally:
            self.release()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock at `path`. It takes nothing from whoever asks for it:
    a lock of readers is tried, and given back at once."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file there, or none that may be read
        return False
    return False
