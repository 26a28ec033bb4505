"""The loss scale's rule, told by looking back."""

from __future__ import annotations


def reference(start: float, window: int, hysteresis: int, minimum: float, overflows: list[bool]) -> list[float]:
    """The scale after each step, by looking back at the whole history instead of keeping counters.

    A run of good steps restarts after an overflow and after each doubling. Overflows since the last doubling (or since
    the start) are tolerated up to hysteresis - 1; every further one halves.
    """
    scales, scale = [], start
    doubled_at = -1
    for now, overflow in enumerate(overflows):
        since_doubling = overflows[doubled_at + 1 : now + 1]
        if overflow:
            if sum(since_doubling) >= hysteresis:
                scale = max(minimum, scale / 2)
        else:
            good = 0
            for earlier in reversed(since_doubling):
                if earlier:
                    break
                good += 1
            if good == window:
                scale, doubled_at = scale * 2, now
        scales.append(scale)
    return scales
