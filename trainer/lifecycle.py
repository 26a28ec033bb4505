"""Signals that ask a run to end. No torch.

A cluster warns before it takes the machines: SIGUSR1 (sbatch --signal), SIGTERM (preemption, a time limit); SIGINT is Ctrl-C.
A signal may reach one rank only, at any moment, more than once. So a handler sets a flag and does nothing else; at the end of
each step the ranks agree whether one of them has it, save that same step, and end with exit code 75: start me again.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
WANTED, LOST = 1001, 1002  # no signals: a later start of this SLURM job waits for the run folder, or has it already
REASONS = {WANTED: "SLURM has started this job again", LOST: "another start of this job has taken the run folder"}


class Ranks(Protocol):
    """What tells each rank the largest value of all."""

    def largest(self, value: int) -> int: ...


class StopRequest:
    """Whether a signal has asked this process to end. SIGQUIT (Ctrl-\\) still ends it at once."""

    def __init__(self) -> None:
        self._signal = 0

    def listen(self) -> None:
        """From now on; only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._heard)

    @property
    def heard(self) -> str:
        """The name of the signal that this process has heard; "" while it has heard none."""
        return signal.Signals(self._signal).name if self._signal else ""

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self, ranks: Ranks, word: int = 0) -> str:
        """Why the run is to end, the same on all ranks: the name of a signal that one has heard, or what a rank's `word` stands
        for; "" while it goes on. Every rank must ask together."""
        number = ranks.largest(max(self._signal, word))
        return REASONS.get(number) or (signal.Signals(number).name if number else "")
