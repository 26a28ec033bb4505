"""The place in the code where a rank is: its stack seen from another thread, and the stack that C
writes when no Python runs. No torch."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

OURS = ("trainer", "parallel", "tools", "tests")
WAITING = os.path.join("torch", "distributed", "")  # code in which a rank only waits for others
SITE = "site-packages" + os.sep
FRAMES = 12
# After so long without a beat, a C thread writes the stack without the interpreter.
NO_PYTHON_S = 4.0

STATES = {
    "T": "is stopped (SIGSTOP; SIGCONT lets it go on)",
    "t": "is held by a debugger",
    "R": "computes, and its interpreter does not run: something holds the GIL",
    "S": "sleeps, and its interpreter does not run: something holds the GIL",
    "D": "waits for a disk or a device",
    "": "is gone",
}


def stack_of(thread_id: int) -> list[str]:
    """Return the stack of a thread as lines `file:line function`, the innermost first; [] if it has
    ended."""
    frame = sys._current_frames().get(thread_id)
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES:
        lines.append(_place(frame, frame.f_lineno))
        frame = frame.f_back
    return lines


def stack_of_error(error: BaseException) -> list[str]:
    """Return where an error came from, the innermost first."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    return [_place(frame, line) for frame, line in frames[:FRAMES]]


def _place(frame: FrameType, line: int) -> str:
    return f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"


def _short(path: str) -> str:
    """Return a path from the package on; what stands before it is the same everywhere."""
    if SITE in path:
        return path.partition(SITE)[2]
    parts = path.split(os.sep)
    at = next((index for index, part in enumerate(parts) if part in OURS), None)
    return os.sep.join(parts[at:]) if at is not None else path


def innermost_of_ours(stack: Sequence[str]) -> str:
    """Return the line that a reader looks for first: the last one of this project, or else the last
    of all."""
    ours = [line for line in stack if line.startswith(tuple(f"{package}{os.sep}" for package in OURS))]
    return (ours or list(stack) or ["?"])[0]


def is_waiting(stack: Sequence[str]) -> bool:
    return bool(stack) and (stack[0].startswith(WAITING) or stack[0].endswith(" wait"))


class LastResort:
    """A file that gets this process's stacks, without its interpreter, when that has not run for a
    while."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)  # whatever is there, even a pipe
        self._file: IO[bytes] = path.open("xb")

    def put_off(self) -> None:
        """Postpone the writing: the interpreter still runs."""
        faulthandler.cancel_dump_traceback_later()
        if os.fstat(self._file.fileno()).st_size:
            self._file.seek(0)
            self._file.truncate()
        faulthandler.dump_traceback_later(NO_PYTHON_S, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self.path.unlink(missing_ok=True)


def written_stack(path: Path) -> list[str]:
    """Return the main thread's stack left by `LastResort`, the innermost first: that of the last
    thread in faulthandler's order."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    *_, main = text.split("(most recent call first):") if "(most recent call first):" in text else [""]
    lines = [line.strip() for line in main.splitlines() if line.strip().startswith('File "')]
    return [_from_faulthandler(line) for line in lines[:FRAMES]]


def _from_faulthandler(line: str) -> str:
    """Return a frame such as `File "/a/trainer/b.py", line 3 in f` in the form `trainer/b.py:3
    f`."""
    _, path, rest = line.split('"', 2)
    number, _, function = rest.removeprefix(", line ").partition(" in ")
    return f"{_short(path)}:{number} {function}"
