"""The files that a run can do without: one that cannot be written costs a line. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.files.reading import told


class Spare:
    """A file that the run can do without, written again and again. `without`: what its loss
    means."""

    def __init__(self, path: Path, without: str) -> None:
        self._path, self._without = path, without
        self._is_told = False

    @contextmanager
    def written(self) -> Iterator[None]:
        """Report a failed write inside instead of raising it, once until a write succeeds again."""
        try:
            yield
        except OSError as error:
            self.failed(error)
        else:
            self._is_told = False

    def failed(self, error: OSError) -> None:
        """Report the error, unless one was reported already."""
        if not self._is_told:
            self._is_told = True
            sys.stderr.write(f"triaxis: warning: {self._path}: {told(error)}: {self._without}; the run goes on\n")
            sys.stderr.flush()
