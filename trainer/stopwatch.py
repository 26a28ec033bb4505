"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums seconds by name: `with watch("forward"): …`, then `lap()` → {name: seconds} since the last lap.

    On a GPU the spans are measured by events on the stream, so that timing does not make the host wait inside the step;
    `lap` waits once, at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase = "start"  # what was timed last, or still is
        self.step = 0  # that is under way, counted from 1; 0 before the first
        self.settled = False  # a step of this process is done: from here on they all take alike
        self.changed = time.monotonic()  # when this rank last got on
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def doing(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def begin(self, phase: str) -> None:
        """What is not timed is watched all the same."""
        self.phase = phase
        self.tick()

    def begin_step(self, step: int) -> None:
        self.settled, self.step = self.step > 0, step
        self.begin("boundary")

    def tick(self) -> None:
        """This rank gets on."""
        self.changed = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin(name)
        if not self._on_cuda:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            self.tick()
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))
        self.tick()

    def lap(self) -> dict[str, float]:
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000.0
        laps = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return laps
