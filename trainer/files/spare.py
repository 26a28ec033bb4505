"""Files that a run can do without: one that cannot be written costs a line, not the run. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.files.reading import told


class Spare:
    """One such file, written again and again. `without`: what is lost with it."""

    def __init__(self, path: Path, without: str) -> None:
        self._path, self._without = path, without
        self._is_told = False

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around a write: it may fail, which is said once until one succeeds again."""
        try:
            yield
        except OSError as error:
            self.failed(error)
        else:
            self._is_told = False

    def failed(self, error: OSError) -> None:
        """Say so, unless it was said."""
        if not self._is_told:
            self._is_told = True
            sys.stderr.write(f"triaxis: warning: {self._path}: {told(error)}: {self._without}; the run goes on\n")
            sys.stderr.flush()
