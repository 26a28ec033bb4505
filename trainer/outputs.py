"""stdout and stderr: on a disk that fills, a pipe whose reader has left, a terminal of another alphabet. No torch.

A write that fails there must end neither a run nor the line that says what ended it, and Python would turn the exit code into
120 when it flushes them at the end. So what cannot be written is dropped, and it is known afterwards that something was.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Output(io.RawIOBase):
    """A descriptor to write to until that fails; `failure` says how it did."""

    def __init__(self, descriptor: int) -> None:
        self.failure: OSError | None = None
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any) -> int:
        while self.failure is None:
            try:
                return os.write(self._descriptor, content)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(content)


@contextmanager
def standard_outputs() -> Iterator[Output | None]:
    """Put both in the place of Python's own for the block; gives stdout's, None where something else has taken its place."""
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__ or sys.stdout is None or sys.stderr is None:
        yield None
        return
    before, raw = (sys.stdout, sys.stderr), (Output(sys.stdout.fileno()), Output(sys.stderr.fileno()))
    sys.stdout, sys.stderr = (_text(*pair) for pair in zip(raw, before, strict=True))
    try:
        yield raw[0]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _text(raw: Output, like: TextIO) -> TextIO:
    """What an alphabet does not have is written as \\xd7: no reason to end anything."""
    lines = raw.isatty() or like is sys.__stderr__
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, like.encoding, "backslashreplace", line_buffering=lines, write_through=lines)
