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
        self.phase = ""  # what was timed last, or still is
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.phase = name
        if not self._on_cuda:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def lap(self) -> dict[str, float]:
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000.0
        laps = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return laps
