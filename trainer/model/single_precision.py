"""Which numbers fp32 has, in which every run computes its updates and norms. No torch."""

from __future__ import annotations

import struct

SMALLEST = 2.0**-126  # kernels that are compiled for speed take what is smaller for 0
LARGEST = (2 - 2.0**-23) * 2.0**127


def in_range(value: float) -> bool:
    """Whether a number above 0 is neither 0 nor infinite in fp32."""
    return SMALLEST <= value <= LARGEST


def rounded(value: float) -> float:
    """The number of fp32 that is nearest, for a value of at most LARGEST."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
