"""Where in the code a rank is: its own stack, seen from another thread, and the stack that C writes when no Python runs. No
torch."""

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
WAITING = os.path.join("torch", "distributed", "")  # code in which a rank does nothing but wait for others
SITE = "site-packages" + os.sep
FRAMES = 12
NO_PYTHON_S = 4.0  # after so long without a beat the stack is written by a thread of C's, which needs no interpreter

STATES = {
    "T": "is stopped (SIGSTOP; SIGCONT lets it go on)",
    "t": "is held by a debugger",
    "R": "computes, and its interpreter does not run: something holds the GIL",
    "S": "sleeps, and its interpreter does not run: something holds the GIL",
    "D": "waits for a disk or a device",
    "": "is gone",
}


def stack_of(thread_id: int) -> list[str]:
    """`file:line function` of a thread, the innermost first; [] when it has ended."""
    frame = sys._current_frames().get(thread_id)
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES:
        lines.append(_place(frame, frame.f_lineno))
        frame = frame.f_back
    return lines


def stack_of_error(error: BaseException) -> list[str]:
    """Where an error came from, the innermost first."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    return [_place(frame, line) for frame, line in frames[:FRAMES]]


def _place(frame: FrameType, line: int) -> str:
    return f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"


def _short(path: str) -> str:
    """From the package on: the rest of the path is the same everywhere."""
    if SITE in path:
        return path.partition(SITE)[2]
    parts = path.split(os.sep)
    at = next((index for index, part in enumerate(parts) if part in OURS), None)
    return os.sep.join(parts[at:]) if at is not None else path


def innermost_of_ours(stack: Sequence[str]) -> str:
    """What a reader looks for first: the last line of this project, else the last line of all."""
    ours = [line for line in stack if line.startswith(tuple(f"{package}{os.sep}" for package in OURS))]
    return (ours or list(stack) or ["?"])[0]


def is_waiting(stack: Sequence[str]) -> bool:
    return bool(stack) and (stack[0].startswith(WAITING) or stack[0].endswith(" wait"))


class LastResort:
    """A file that holds this process's stacks when its interpreter has not run for a while, written without it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)  # whatever is there, a pipe too
        self._file: IO[bytes] = path.open("xb")

    def put_off(self) -> None:
        """I still run."""
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
    """What `LastResort` left of the main thread, the innermost first: the last thread in faulthandler's order."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    *_, main = text.split("(most recent call first):") if "(most recent call first):" in text else [""]
    lines = [line.strip() for line in main.splitlines() if line.strip().startswith('File "')]
    return [_from_faulthandler(line) for line in lines[:FRAMES]]


def _from_faulthandler(line: str) -> str:
    """File "/a/trainer/b.py", line 3 in f → trainer/b.py:3 f"""
    _, path, rest = line.split('"', 2)
    number, _, function = rest.removeprefix(", line ").partition(" in ")
    return f"{_short(path)}:{number} {function}"
