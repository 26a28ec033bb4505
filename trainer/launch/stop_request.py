"""The signals that ask a run to end. No torch.

A cluster warns before it takes the machines: SIGUSR1 (sbatch --signal), SIGTERM (preemption, a time
limit); SIGINT is Ctrl-C. A signal may reach one rank only, at any moment, more than once. Before
the first step there is nothing to save, and it ends this rank at once. While a run trains, a
handler sets a flag and does nothing else. At the end of each step the ranks agree whether one of
them has it, save that same step, and end. The exit code is always 75: start me again.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

from trainer.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Not signals: a later start of this SLURM job waits for the run folder, or has taken it already.
WANTED, LOST = 1001, 1002
REASONS = {WANTED: "SLURM has started this job again", LOST: "another start of this job has taken the run folder"}


class Ranks(Protocol):
    """A group of ranks that can tell each of them the largest value of all."""

    def largest(self, value: int) -> int: ...


class Interrupted(KeyboardInterrupt):
    """A signal that came before the first step.

    It is not an `Exception`, so that a library that turns every exception into one of its own does
    not turn this.
    """

    exit_code = EXIT_REQUEUE

    def __init__(self, name: str, doing: str = "before the first step") -> None:
        self.name = name
        self.lines = [f"{name}: ended {doing}; start the run again"]
        super().__init__(*self.lines)


class StopRequest:
    """A record of whether a signal has asked this process to end. SIGQUIT (Ctrl-\\) still ends it
    at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._is_training = False

    def listen(self) -> None:
        """Start to handle the signals. Only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._heard)

    def deafen(self) -> None:
        """Ignore further signals: all is saved, and one that comes while the interpreter ends must
        not change the exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def trains(self) -> None:
        """Mark that there is something to save from now on. Raises Interrupted if a signal came
        before."""
        self._is_training = True
        if self._signal:
            raise Interrupted(signal.Signals(self._signal).name)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if not self._is_training:
            raise Interrupted(signal.Signals(number).name)

    def agreed(self, ranks: Ranks, word: int = 0) -> str:
        """Return why the run is to end, the same on all ranks, or "" while it goes on.

        It is the name of a signal that one rank has received, or the meaning of a rank's `word`.
        Every rank must call it together.
        """
        number = ranks.largest(max(self._signal, word))
        return REASONS.get(number) or (signal.Signals(number).name if number else "")
