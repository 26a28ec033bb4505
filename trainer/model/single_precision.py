"""The range of fp32, in which every run computes its updates and norms. No torch."""

from __future__ import annotations

import struct

SMALLEST = 2.0**-126  # kernels that are compiled for speed treat smaller numbers as 0
LARGEST = (2 - 2.0**-23) * 2.0**127


def in_range(value: float) -> bool:
    """Return whether a number above 0 is neither 0 nor infinite in fp32."""
    return SMALLEST <= value <= LARGEST


def rounded(value: float) -> float:
    """Return the nearest number of fp32, for a value of at most LARGEST."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
