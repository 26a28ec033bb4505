"""The map of ranks, as arithmetic: no processes, no torch.

Axes from outermost to innermost are pp, dp, cp, tp. The innermost neighbours have consecutive ranks
and so share the fastest link: tensor parallelism communicates in every layer, data parallelism once
a step, pipeline stages only pass activations on.

>>> layout = Layout(pp=2, dp=2, tp=2)
>>> layout.coord(5)
Coord(pp=1, dp=0, cp=0, tp=1)
>>> layout.groups("tp")
[(0, 1), (2, 3), (4, 5), (6, 7)]
>>> layout.groups("dp")
[(0, 2), (1, 3), (4, 6), (5, 7)]
>>> layout.groups("pp", "tp")
[(0, 1, 4, 5), (2, 3, 6, 7)]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

AXES = ("pp", "dp", "cp", "tp")


class Coord(NamedTuple):
    """A rank's place along each axis."""

    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The degrees of the axes; their product is the world size."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"degree of {axis} is {getattr(self, axis)}; it must be at least 1")

    @classmethod
    def from_world_size(cls, world_size: int, *, pp: int = 1, cp: int = 1, tp: int = 1) -> Layout:
        """Return the layout whose data-parallel degree fills the world. ValueError if the other
        degrees do not divide it."""
        replica = pp * cp * tp
        if world_size % replica:
            raise ValueError(
                f"world size {world_size} is not a multiple of tensor {tp} * pipeline {pp} * context {cp} = {replica}"
            )
        return cls(pp=pp, dp=world_size // replica, cp=cp, tp=tp)

    @property
    def degrees(self) -> Coord:
        return Coord(self.pp, self.dp, self.cp, self.tp)

    @property
    def world_size(self) -> int:
        return math.prod(self.degrees)

    def coord(self, rank: int) -> Coord:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        places = []
        for degree in reversed(self.degrees):
            rank, place = divmod(rank, degree)
            places.append(place)
        return Coord(*reversed(places))

    def rank(self, coord: Coord) -> int:
        rank = 0
        for place, degree in zip(coord, self.degrees, strict=True):
            rank = rank * degree + place
        return rank

    def peers(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Return the ranks that differ from this one only along `axes`, in order, with itself."""
        here = self.coord(rank)
        places = [
            range(degree) if axis in axes else (place,) for axis, place, degree in zip(AXES, here, self.degrees, strict=True)
        ]
        return tuple(self.rank(Coord(*coord)) for coord in product(*places))

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Return all groups of peers along `axes`, ordered by their first rank. Together they hold
        each rank once."""
        firsts = (r for r in range(self.world_size) if not any(getattr(self.coord(r), axis) for axis in axes))
        return [self.peers(rank, *axes) for rank in firsts]
