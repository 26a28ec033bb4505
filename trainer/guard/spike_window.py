"""The detection of spikes, values far above those before, by median and median absolute deviation.
No torch.

Both hardly move while less than half of the window is wild (Hampel 1974,
doi:10.1080/01621459.1974.10482962), whereas one NaN or one spike would carry a running mean and its
deviation away. So spikes enter the window too: a level that has risen for good is the new normal
after half a window.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

NORMAL = 1.4826  # median absolute deviation → standard deviation, for normally distributed values
# A series that hardly moves has almost no deviation; it counts as at least this share of the
# median.
LEAST_DEVIATION = 0.01


class SpikeWindow:
    """The last `size` finite values, and the limit for a new one; there is no limit before there
    are so many."""

    def __init__(self, size: int, threshold: float, values: Iterable[float] = ()) -> None:
        """Start with `values`. `threshold`: the robust standard deviations above the median at
        which a spike begins."""
        self._threshold = threshold
        self._values = deque(values, maxlen=size)

    @property
    def values(self) -> list[float]:
        return list(self._values)

    @property
    def limit(self) -> float:
        """The largest value that is not a spike; inf while the window is not full."""
        if len(self._values) < (self._values.maxlen or 0):
            return math.inf
        middle = statistics.median(self._values)
        deviation = NORMAL * statistics.median(abs(value - middle) for value in self._values)
        return middle + self._threshold * max(deviation, LEAST_DEVIATION * abs(middle))

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._values.append(value)
