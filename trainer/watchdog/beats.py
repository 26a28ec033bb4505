"""The beats: each rank's report of itself a few times a second, and when their silence is a hang.
No torch, no other host's clock.

A rank makes progress when its phase, its step or its micro-batch changes. The time without progress
is measured by its own clock, the time without a beat by the listener's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from trainer.launch.processes import Process

IN_A_STEP = ("boundary", "data", "forward", "backward", "optimizer")
DONE = "done"  # `ended` of a rank that reached its end
SILENT_S = 3.0  # a thread that reports twice a second and has not for so long is not running


@dataclass(frozen=True)
class Beat:
    """A rank's report.

    `idle_s`: the time without progress; `limit_s`: the most it may be. `host`, `table`, `pid`,
    `started`: its process, see `Process`. `data_s`, `compute_s`: time since its start spent on its
    data and on computing, without waiting. `answer_s`: the time the store took to answer. `ended`:
    "", or how it ended.
    """

    rank: int
    host: str
    table: str
    pid: int
    started: int
    count: int
    step: int
    phase: str
    doing: str
    idle_s: float
    limit_s: float
    data_s: float = 0.0
    compute_s: float = 0.0
    answer_s: float = 0.0
    ended: str = ""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))

    @property
    def process(self) -> Process:
        return Process(self.host, self.table, self.pid, self.started)

    @property
    def at(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


@dataclass(frozen=True)
class Limits:
    """The longest times without progress: within a step, once one is done, and everywhere else.

    Elsewhere is the start, the first step, an evaluation, saving.
    """

    step_s: float
    long_s: float

    @property
    def longest_s(self) -> float:
        return max(self.long_s, self.step_s)

    def of(self, phase: str, *, settled: bool) -> float:
        return self.step_s if settled and phase in IN_A_STEP else self.longest_s


@dataclass
class Roll:
    """The last beat of each rank, and the time at which it came."""

    limits: Limits
    beats: dict[int, Beat] = field(default_factory=dict)
    heard: dict[int, float] = field(default_factory=dict)

    def hear(self, beats: Iterable[Beat], now: float) -> None:
        for beat in beats:
            last = self.beats.get(beat.rank)
            if last is None or last.count != beat.count:
                self.beats[beat.rank], self.heard[beat.rank] = beat, now

    def idle_s(self, rank: int, now: float) -> float:
        """Return the time for which the rank has made no progress, if it reports nothing more: a
        lower bound."""
        return self.beats[rank].idle_s + now - self.heard[rank]

    def has_ended(self, rank: int) -> bool:
        return rank in self.beats and bool(self.beats[rank].ended)

    def silent(self, now: float) -> list[int]:
        """Return the ranks that have not ended, but sent no beat for a while."""
        return [rank for rank, beat in self.beats.items() if not beat.ended and now - self.heard[rank] > SILENT_S]

    def longest_s(self, now: float) -> float:
        return max((self.idle_s(rank, now) for rank, beat in self.beats.items() if not beat.ended), default=0.0)

    def hang(self, now: float) -> bool:
        """Return whether no rank makes progress though each should, or one has made none for longer
        than anything may take.

        While one rank is within its limit the others may be waiting for it, for example for the
        first rank that saves. A silent rank gets the smallest limit of all: its last beat may be
        half a second old, and it may since have come from its first step, which may take long, to
        where the others are.
        """
        running = [rank for rank, beat in self.beats.items() if not beat.ended]
        limits = {rank: self.beats[rank].limit_s for rank in running}
        limits |= dict.fromkeys(set(self.silent(now)), min(limits.values(), default=0.0))
        over = [rank for rank in running if self.idle_s(rank, now) >= limits[rank]]
        return bool(running) and (over == running or self.longest_s(now) >= self.limits.longest_s)
