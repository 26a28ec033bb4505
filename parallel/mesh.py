"""The process groups of a rank, made from a layout and passed on as arguments; none is global."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.topology import Coord, Layout


@dataclass(frozen=True)
class Group:
    """The ranks that a layer communicates with, and this rank's place among them.

    Every parallel layer takes one explicitly. A group of one rank never communicates, so a layer
    built on `Group.alone()` is the plain layer and needs no process group, as in oracles and
    one-process runs. A larger group without a handle is a place among ranks that are not running.
    """

    rank: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @classmethod
    def alone(cls) -> Group:
        return cls(rank=0, ranks=(0,), handle=None)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def part(self, whole: int, what: str) -> int:
        """Return this group's equal share of `whole`; ValueError if it does not divide."""
        if whole % self.size:
            raise ValueError(f"{what} = {whole} does not divide over {self.size} ranks")
        return whole // self.size

    def divide(self, parts: int) -> Group:
        """Return this rank's part of the group cut into `parts` runs of neighbours.

        Every rank of the group calls with the same number. ValueError if it does not divide.
        """
        if self.size % parts:
            raise ValueError(f"{self.size} ranks do not divide into {parts} parts")
        size = self.size // parts
        first = self.rank // size * size
        ranks = self.ranks[first : first + size]
        connected = self.handle is not None and size > 1
        handle = dist.new_group(list(ranks), use_local_synchronization=True) if connected else None
        return Group(rank=self.rank - first, ranks=ranks, handle=handle)


@dataclass(frozen=True)
class Mesh:
    """A layout as one rank sees it.

    | group | ranks that differ in | used by |
    |---|---|---|
    | tp | tp | parallel layers |
    | pp | pp | the pipeline's activations and their gradients |
    | ends | pp, first and last only | weights that the first and the last stage share |
    | data | dp | whose sequences a rank takes: loading, dropout streams, sequence numbers |
    | reduction | dp and cp | gradient reduction, ZeRO, the step's target count |
    | replica | pp and tp | the gradient norm: together these ranks hold one copy of the model |
    """

    layout: Layout
    rank: int
    tp: Group
    pp: Group
    ends: Group | None  # None between the ends, and if one rank is both
    data: Group
    reduction: Group
    replica: Group

    @property
    def coord(self) -> Coord:
        return self.layout.coord(self.rank)

    @classmethod
    def build(cls, layout: Layout, timeout: timedelta | None = None) -> Mesh:
        """Make this rank's groups, in the same order on all ranks; `timeout` is that of a
        collective.

        Every rank makes only those that it is in, so the work does not grow with the number of
        groups. The ends come last: torch names a group by its ranks and by how many groups a rank
        is in, which must be the same for all of them.
        """
        if layout.world_size != dist.get_world_size():
            raise ValueError(f"layout {layout} has {layout.world_size} ranks, the world has {dist.get_world_size()}")
        rank = dist.get_rank()

        def join(*axes: str) -> Group:
            return _joined(layout.peers(rank, *axes), rank, timeout, "×".join(axes))

        tp, pp, reduction, replica = join("tp"), join("pp"), join("dp", "cp"), join("pp", "tp")
        data = join("dp") if layout.cp > 1 else reduction
        ends = None
        if layout.pp > 1 and pp.rank in (0, pp.size - 1):
            ends = _joined((pp.ranks[0], pp.ranks[-1]), rank, timeout, "ends")
        return cls(layout, rank, tp, pp, ends, data, reduction, replica)


def _joined(ranks: tuple[int, ...], rank: int, timeout: timedelta | None, name: str) -> Group:
    """Make the group of these ranks; torch's flight recorder calls it `name`."""
    handle = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=name)
    return Group(rank=ranks.index(rank), ranks=ranks, handle=handle)
