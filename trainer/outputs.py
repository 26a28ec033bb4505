"""The handling of stdout and stderr on a full disk, a pipe without a reader, or a terminal of
another encoding. No torch.

A write that fails there must end neither a run nor the line that tells what ended it, and Python
would turn the exit code into 120 when it flushes them at the end. So what cannot be written is
dropped, and it is known afterwards that something was.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Output(io.RawIOBase):
    """A descriptor to write to until that fails; `failure` tells how. With None it was closed
    before the start (`>&-`)."""

    def __init__(self, descriptor: int | None) -> None:
        self.failure: OSError | None = None
        if descriptor is None:
            self.failure, descriptor = OSError(errno.EBADF, os.strerror(errno.EBADF)), os.open(os.devnull, os.O_WRONLY)
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
    """Replace both of Python's own streams inside the context, and yield the new stdout; None if
    something else had replaced them."""
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield None
        return
    before = (sys.stdout, sys.stderr)
    # A closed stream is None, although its type does not say so.
    raw = [Output(stream.fileno() if stream else None) for stream in before]
    sys.stdout, sys.stderr = _text(raw[0], before[0]), _text(raw[1], before[1], by_line=True)
    try:
        yield raw[0]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _text(raw: Output, like: TextIO | None, *, by_line: bool = False) -> TextIO:
    """Return a text stream that writes characters missing from the encoding with a backslash,
    instead of failing."""
    encoding = like.encoding if like else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line or raw.isatty())
