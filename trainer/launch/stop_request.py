"""Signals that ask a run to end. No torch.

A cluster warns before it takes the machines: SIGUSR1 (sbatch --signal), SIGTERM (preemption, a time limit); SIGINT is Ctrl-C.
A signal may reach one rank only, at any moment, more than once. Before the first step there is nothing to save, and it ends
this rank at once. While a run trains, a handler sets a flag and does nothing else; at the end of each step the ranks agree
whether one of them has it, save that same step, and end. The exit code is 75 each time: start me again.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

from trainer.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
WANTED, LOST = 1001, 1002  # no signals: a later start of this SLURM job waits for the run folder, or has it already
REASONS = {WANTED: "SLURM has started this job again", LOST: "another start of this job has taken the run folder"}


class Ranks(Protocol):
    """What tells each rank the largest value of all."""

    def largest(self, value: int) -> int: ...


class Interrupted(KeyboardInterrupt):
    """A signal came before the first step. No `Exception`: a library that turns whatever it meets into an error of its own must
    not turn this."""

    exit_code = EXIT_REQUEUE

    def __init__(self, name: str, doing: str = "before the first step") -> None:
        self.name = name
        self.lines = [f"{name}: ended {doing}; start the run again"]
        super().__init__(*self.lines)


class StopRequest:
    """Whether a signal has asked this process to end. SIGQUIT (Ctrl-\\) still ends it at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._is_training = False

    def listen(self) -> None:
        """From now on; only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._heard)

    def deafen(self) -> None:
        """All is said and saved: another signal, while the interpreter ends, must not change the exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def trains(self) -> None:
        """From now on there is something to save. Interrupted where a signal came before."""
        self._is_training = True
        if self._signal:
            raise Interrupted(signal.Signals(self._signal).name)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if not self._is_training:
            raise Interrupted(signal.Signals(number).name)

    def agreed(self, ranks: Ranks, word: int = 0) -> str:
        """Why the run is to end, the same on all ranks: the name of a signal that one has heard, or what a rank's `word` stands
        for; "" while it goes on. Every rank must ask together."""
        number = ranks.largest(max(self._signal, word))
        return REASONS.get(number) or (signal.Signals(number).name if number else "")
