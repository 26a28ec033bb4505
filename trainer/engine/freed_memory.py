"""The C library's handling of freed memory of the host."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# mallopt's names, and the values: it keeps up to 1 GiB of freed memory for the next allocation, and
# takes blocks up to 32 MiB, the most it may, from what it keeps.
KEPT = {"M_TRIM_THRESHOLD": (-1, 2**30), "M_MMAP_THRESHOLD": (-3, 2**25)}
# variables by which users say it themselves
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Make glibc keep freed memory for the next tensors, unless the user's variables tell it what
    to do. Return whether it does.

    Else it gives gradients and activations back to the system in each step, which zeroes each page
    anew in the next: steps of a Llama with 35 million parameters on CPUs took 19 % longer at ZeRO-2
    and 4 % at ZeRO-3. The peak is the same: most memory is held within a step.
    """
    if any(name in environment for name in OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    taken = [mallopt(parameter, value) for parameter, value in KEPT.values()]
    return all(taken)
