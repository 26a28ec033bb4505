"""The times of a step's parts and of a whole process, and what this rank is at, for those who watch
it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """A sum of seconds by name: `with watch("forward"): …`, then `lap()` → {name: seconds} since
    the last lap.

    On a GPU the spans are measured by events on the stream, so that timing does not make the host
    wait inside the step; `lap` waits once, at its end. `totals()` are the host's seconds since the
    beginning, each counted once: time in a nested part does not count for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase = "start"  # the part begun last
        self.step = 0  # the step under way, counted from 1; 0 before the first
        self.settled = False  # a step of this process is done: later ones take about as long
        self.changed = time.monotonic()  # the time of this rank's last progress
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._totals: dict[str, float] = defaultdict(float)
        self._under_way = ["start"]  # the parts that are now open, the outermost first
        self._counted = self.changed

    @property
    def doing(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def begin(self, phase: str) -> None:
        """Begin a part that lasts until the next one begins, except for the parts inside it."""
        self._count()
        self._under_way[0] = self.phase = phase

    def begin_step(self, step: int) -> None:
        self.settled, self.step = self.step > 0, step
        self.begin("boundary")

    def tick(self) -> None:
        """Record that this rank makes progress."""
        self.changed = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._count()
        self._under_way.append(name)
        self.phase = name
        try:
            with self._events_around(name) if self._on_cuda else self._clock_around(name):
                yield
        finally:
            self._count()
            self._under_way.pop()

    def lap(self) -> dict[str, float]:
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000.0
        laps = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return laps

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part since this was made; together they are all seconds."""
        self._count()
        return dict(self._totals)

    def _count(self) -> None:
        now = time.monotonic()
        self._totals[self._under_way[-1]] += now - self._counted
        self._counted = self.changed = now

    @contextmanager
    def _clock_around(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def _events_around(self, name: str) -> Iterator[None]:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))
