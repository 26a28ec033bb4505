"""An array in a file, read by ranges.

A memory map would take less code, but a file that is truncated while it is mapped ends the process
with SIGBUS: no message, no exit code of ours. Here a range that no longer exists is an error that
names the file. Either way the pages stay in the system's cache.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError
from trainer.files.reading import open_regular, told

SEARCHED = 4096  # values read at once in a search: 32 KiB, some microseconds


def damage(path: Path, fault: str) -> DataError:
    """Return the error for a damaged file of tokenized data."""
    return DataError(f"{path}: {fault}; delete {path.parent.parent} to tokenize again")


class ArrayFile:
    """A one-dimensional array in a file. Raises DataError that names the file if it cannot be
    read."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self.dtype = path, dtype
        try:
            with open_regular(path) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise damage(path, f"cannot be read: {told(error)}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._length = os.fstat(self._descriptor).st_size // dtype.itemsize
        self._firsts: dict[int, int] = {}  # first values of the blocks read so far

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> npt.NDArray[Any]:
        """Return the elements [begin, end) as a read-only array of its own."""
        begin, end, _ = span.indices(self._length)
        return np.frombuffer(self._bytes(begin, max(begin, end)), self.dtype)

    def searchsorted(self, values: Sequence[int], side: Literal["left", "right"]) -> list[int]:
        """Return the index at which each value would be inserted into the ascending array, as in
        numpy."""
        return [self._place_of(value, side) for value in values]

    def _place_of(self, value: int, side: Literal["left", "right"]) -> int:
        blocks = range(-(-self._length // SEARCHED))
        search = bisect_left if side == "left" else bisect_right
        block = max(0, search(blocks, value, key=self._first_of) - 1)
        begin = block * SEARCHED
        return begin + int(np.searchsorted(self[begin : begin + SEARCHED], value, side=side))

    def _first_of(self, block: int) -> int:
        if block not in self._firsts:
            self._firsts[block] = int(self[block * SEARCHED : block * SEARCHED + 1][0])
        return self._firsts[block]

    def _bytes(self, begin: int, end: int) -> bytes:
        size = self.dtype.itemsize
        parts, at, missing = [], begin * size, (end - begin) * size
        while missing:
            try:
                part = os.pread(self._descriptor, missing, at)
            except OSError as error:
                raise damage(self._path, f"cannot be read: {told(error)}") from None
            if not part:
                raise damage(self._path, f"was cut short while it was read, {missing:,} bytes before the end of what is needed")
            parts.append(part)
            at, missing = at + len(part), missing - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
