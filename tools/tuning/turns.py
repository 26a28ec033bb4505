"""Training loops that take one step at a time, each in a process of its own.

A loop says through a pipe that a step is done, and waits there for its next turn. So loops that
cannot be called step by step (those of trainers) are timed step by step, while every other one
sleeps. This module imports nothing large: it would count as memory of each loop.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TOOLS = Path(__file__).parents[1]
HERE = (str(TOOLS), str(TOOLS.parent))  # where a loop finds its modules
STEP, END = "step\n", "end\n"
LAST_LINES = 12  # of a loop's output, where it fails


class Turn:
    """The end of the pipe in a loop's process."""

    def __init__(self, reads: int, writes: int) -> None:
        """Take the two descriptors that `Loop` gave to the process as its last arguments."""
        self._words = os.fdopen(reads)
        self._answers = os.fdopen(writes, "w")
        self._since: float | None = None

    @classmethod
    def from_arguments(cls) -> Turn:
        return cls(int(sys.argv[-2]), int(sys.argv[-1]))

    def wait(self, **numbers: float) -> bool:
        """Report the step that has just ended with its numbers, if there was one, and wait. Return
        whether another step is wanted."""
        if self._since is not None:
            self._say({"seconds": time.perf_counter() - self._since, **numbers})
        wanted = self._words.readline() == STEP
        self._since = time.perf_counter() if wanted else None
        if not wanted:
            self._say({"peak_gib": peak_gib()})
        return wanted

    def _say(self, record: Mapping[str, float]) -> None:
        self._answers.write(json.dumps(record) + "\n")
        self._answers.flush()


def peak_gib() -> float:
    """Return the most memory [GiB] that was resident in this process so far."""
    # not getrusage: it also counts the process that this one was forked from
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) / 2**20


class LoopFailed(Exception):
    """The error that a process has ended too early."""

    @classmethod
    def of(cls, name: str, log: Path) -> LoopFailed:
        """Return the error with the last lines that the process wrote."""
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return cls("\n".join([f"{name} has ended:", *said]))


@dataclass
class Step:
    """A step's duration and its numbers."""

    seconds: float
    loss: float
    grad_norm: float


class Loop:
    """A loop's process: `python -m MODULE JOB`, which answers each of its turns by a `Turn`."""

    def __init__(self, name: str, module: str, job: Path, log: Path) -> None:
        self.name, self._log = name, log
        words, self._words = _pipe("w")
        answers, self._answers = _pipe("r")
        self._process = started([module, str(job), str(words), str(answers)], log, keeps=(words, answers))
        os.close(words)
        os.close(answers)

    def step(self) -> Step:
        """Take the next step."""
        return Step(**self._ask(STEP))

    def end(self) -> float:
        """End the loop after its last step, and return the most memory [GiB] that it had."""
        peak: float = self._ask(END)["peak_gib"]
        self.close()
        return peak

    def close(self) -> None:
        """End the process, wherever it is."""
        for pipe in (self._words, self._answers):
            pipe.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, word: str) -> dict[str, Any]:
        try:
            self._words.write(word)
            self._words.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LoopFailed.of(self.name, self._log)
        record: dict[str, Any] = json.loads(line)
        return record


def started(words: Sequence[str], log: Path, *, keeps: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start `python -m` with these words, its output in `log`; it inherits the descriptors of
    `keeps`."""
    with log.open("w", encoding="utf-8") as said:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([*HERE, *filter(None, [os.environ.get("PYTHONPATH")])])},
            pass_fds=keeps,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def run(name: str, words: Sequence[str], log: Path) -> None:
    """Run `python -m` with these words to its end. LoopFailed if it fails."""
    if started(words, log).wait():
        raise LoopFailed.of(name, log)


# no hub, no telemetry, no colours in the log
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}


def _pipe(mode: str) -> tuple[int, IO[str]]:
    """Return the descriptor of the loop's end of a pipe, and the other end: one to write to, "w",
    or to read from, "r"."""
    reads, writes = os.pipe()
    theirs, ours = (reads, writes) if mode == "w" else (writes, reads)
    return theirs, os.fdopen(ours, mode)
