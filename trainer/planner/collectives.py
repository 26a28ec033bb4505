"""The time of collectives on rings, from message size, ranks and links. No torch.

A ring all-reduce of B bytes over n ranks sends 2 (n − 1) / n · B over each link, a reduce-scatter
or an all-gather half of that (Thakur et al. 2005, doi:10.1177/1094342005051521).
"""

from __future__ import annotations

import math

from trainer.planner.devices import Device, Link


def link_of(device: Device, ranks: int, stride: int) -> Link:
    """Return the slowest link of a ring of ranks that are `stride` apart."""
    return device.inside if ranks * stride <= device.per_node else device.outside


def all_reduce(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has the sum of all."""
    return 2 * reduce_scatter(num_bytes, ranks, link)


def reduce_scatter(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has its part of the sum; the same for an all-gather of
    `num_bytes` in all."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) / ranks * num_bytes / link.reached + link.latency * math.log2(ranks) / 2


def send(num_bytes: float, link: Link) -> float:
    """Return the seconds until another rank has the tensor."""
    return num_bytes / link.reached + link.latency
