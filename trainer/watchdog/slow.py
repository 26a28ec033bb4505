"""The search for slow ranks, and at what they are slow, from what all ranks report. Nobody is
stopped for it. No torch.

Ranks that hold the same stage do the same work, so each is compared with the median of the others.
A rank that holds a stage alone is compared with its own past. A rank's own part of a step is the
time it did not spend waiting for others (seen on CPUs; a GPU's host runs ahead of it, so there only
the data counts). One window is no proof: a rank that is named was slow at the same thing in
`WINDOWS` of them in a row. Slowness that wanders from rank to rank is nobody's.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.watchdog.beats import Beat

WINDOW_S, WINDOW_STEPS = 10.0, 5  # at least so long: 100 samples tell a share to 5 %
WINDOWS = 3
FACTOR = 1.4  # times the others' median
LEAST_SHARE = 0.05  # of the step: a multiple of almost nothing is still almost nothing
SLOW_ANSWER_S = 0.02  # a message through the store takes 0.1 to 1 ms


@dataclass(frozen=True)
class Window:
    """The seconds that a rank spent per step on its data, on computing, and in all, and the time
    that the store took to answer."""

    data_s: float
    compute_s: float
    step_s: float
    answer_s: float


class SlowRanks:
    """A judge of slowness. `peers`: groups of ranks that do the same work."""

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self._peers = {rank: [other for other in group if other != rank] for group in peers for rank in group}
        self._since: dict[int, tuple[float, Beat]] = {}
        self._before: dict[int, list[Window]] = {}
        self._in_a_row: Counter[tuple[int, str]] = Counter()

    def hear(self, beats: Iterable[Beat], now: float) -> list[str]:
        """Return a line for each rank that has just been found slow."""
        last = {beat.rank: beat for beat in beats}
        if not self._since:
            self._begin(last, now)
        windows = {rank: self._window(beat, now) for rank, beat in last.items()}
        if any(window is None for window in windows.values()):
            return []
        self._begin(last, now)
        return self._judge({rank: window for rank, window in windows.items() if window is not None})

    def _begin(self, beats: Mapping[int, Beat], now: float) -> None:
        self._since = {rank: (now, beat) for rank, beat in beats.items()}

    def _window(self, beat: Beat, now: float) -> Window | None:
        """Return the window up to this beat, or None while it is too short."""
        since, first = self._since.get(beat.rank, (now, beat))
        steps = beat.step - first.step
        if now - since < WINDOW_S or steps < WINDOW_STEPS:
            return None
        return Window(
            data_s=(beat.data_s - first.data_s) / steps,
            compute_s=(beat.compute_s - first.compute_s) / steps,
            step_s=(now - since) / steps,
            answer_s=beat.answer_s,
        )

    def _judge(self, windows: Mapping[int, Window]) -> list[str]:
        found: dict[tuple[int, str], str] = {}
        for rank, window in windows.items():
            others = [windows[other] for other in self._peers[rank] if other in windows] or self._before.get(rank, [])
            if others:
                found |= {(rank, cause): line for cause, line in _slow(rank, window, others)}
            if not self._peers[rank]:
                self._before.setdefault(rank, []).append(window)
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in found})
        return [line for key, line in found.items() if self._in_a_row[key] == WINDOWS]


def _slow(rank: int, window: Window, others: Sequence[Window]) -> Iterable[tuple[str, str]]:
    for cause, what in (("data_s", "its data"), ("compute_s", "computation")):
        mine, usual = getattr(window, cause), statistics.median(getattr(other, cause) for other in others)
        if mine > FACTOR * usual and mine - usual > LEAST_SHARE * window.step_s:
            yield cause, f"rank {rank} is slow in {what}: {mine:.3g} s a step, where {usual:.3g} s are usual"
    usual = statistics.median(other.answer_s for other in others)
    if window.answer_s > max(SLOW_ANSWER_S, 10 * usual):
        yield (
            "answer_s",
            f"rank {rank} is slow in communication: a message takes {window.answer_s:.3g} s, where {usual:.3g} s are usual",
        )
