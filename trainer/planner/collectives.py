"""The time of collectives on rings, from message size, ranks and links. No torch.

A ring all-reduce of B bytes over n ranks sends 2 (n − 1) / n · B over each link, a reduce-scatter
or an all-gather half of that (Thakur et al. 2005, doi:10.1177/1094342005051521).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from trainer.planner.devices import Device, Link
from trainer.planner.speeds import Table


def link_of(device: Device, ranks: int, stride: int) -> Link:
    """Return the slowest link of a ring of ranks that are `stride` apart.

    Between nodes a ring passes each node once, and there are as many rings as the node has ranks of
    the group: each takes its part over the port of its own device.
    """
    if ranks * stride <= device.per_node:
        return device.inside
    rings = max(1, device.per_node // stride)
    most = device.inside.reached / device.outside.share
    return replace(device.outside, rate=min(rings * device.outside.rate, most))


def all_reduce(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has the sum of all."""
    if (seconds := _measured("all_reduce", num_bytes, ranks, link)) is not None:
        return seconds
    return 2 * _once_around(num_bytes, ranks, link)


def reduce_scatter(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has its part of the sum of tensors of `num_bytes`."""
    if (seconds := _measured("reduce_scatter", num_bytes, ranks, link)) is not None:
        return seconds
    return _once_around(num_bytes, ranks, link)


def all_gather(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has all parts, `num_bytes` together."""
    if (seconds := _measured("all_gather", num_bytes, ranks, link)) is not None:
        return seconds
    return _once_around(num_bytes, ranks, link)


def _once_around(num_bytes: float, ranks: int, link: Link) -> float:
    if ranks == 1:
        return 0.0
    return (ranks - 1) / ranks * num_bytes / link.reached + link.latency * math.log2(ranks) / 2


def send(num_bytes: float, link: Link) -> float:
    """Return the seconds until another rank has the tensor."""
    if "send_and_back" in link.measured:  # half of the tensor there, then half of it back
        return _interpolated(link.measured["send_and_back"], 2 * num_bytes) / 2
    return num_bytes / link.reached + link.latency


def _measured(kind: str, num_bytes: float, ranks: int, link: Link) -> float | None:
    """Return the seconds of a collective from those of two ranks, if there are any. With more ranks
    each link of the ring carries (n − 1) / n of the tensor in place of a half."""
    if ranks == 1 or not num_bytes:
        return 0.0
    if kind not in link.measured:
        return None
    return 2 * (ranks - 1) / ranks * _interpolated(link.measured[kind], num_bytes)


def _interpolated(table: Table, num_bytes: float) -> float:
    """Return the seconds between two measured sizes, in a straight line; beyond them, at the rate
    of the nearest one."""
    points = sorted((float(2.0 ** sizes[0]), seconds) for sizes, seconds in table.points)
    (first, least), (last, most) = points[0], points[-1]
    if num_bytes <= first:
        return least
    if num_bytes >= last:
        return most * num_bytes / last
    for (low, short), (high, long) in itertools.pairwise(points):
        if num_bytes <= high:
            return short + (long - short) * (num_bytes - low) / (high - low)
    return most
