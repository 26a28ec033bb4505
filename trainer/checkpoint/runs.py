"""Runs of fragments: how a manifest stays short, however many ranks wrote the checkpoint. No torch.

ZeRO cuts a box of a logical tensor into equal shares, one for each data-parallel rank. What 16,384
ranks hold of it is then one run, not 16,384 entries: the first share, how many follow, and how far
their files are apart. Shares that are not alike, such as the last one, are runs of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from parallel.pieces import Fragment, Piece
from trainer.checkpoint.geometry import index, overlaps


class Stored(NamedTuple):
    """A fragment and the number of the file, in the manifest's list, that holds it."""

    file: int
    fragment: Fragment


class Run(NamedTuple):
    """Fragments of equal size that follow each other in the flattening of one box.

    The first is in the file of number `file`, each of the others `stride` files after the one
    before it.
    """

    file: int
    first: Fragment
    repeats: int = 1
    stride: int = 0

    @property
    def last_file(self) -> int:
        return self.file + (self.repeats - 1) * self.stride

    @property
    def together(self) -> Fragment:
        """The fragment that all of its own make together."""
        return replace(self.first, count=self.first.count * self.repeats)

    def at(self, number: int) -> Stored:
        """Return the fragment of that number, counted from 0."""
        fragment = replace(self.first, offset=self.first.offset + number * self.first.count)
        return Stored(self.file + number * self.stride, fragment)

    def stored(self) -> Iterator[Stored]:
        """Yield all its fragments."""
        return map(self.at, range(self.repeats))

    def meeting(self, wanted: Fragment) -> Iterator[Stored]:
        """Yield its fragments that may share elements with `wanted`: a search by arithmetic, in
        which no others are looked at."""
        if self.repeats == 1:
            yield self.at(0)
            return
        shared = list(overlaps(self.together, wanted))
        if not shared:
            return
        ends = [(index(self.together, box.top, box.left), self._end(box.bottom, box.right)) for box in shared]
        first = min(begin for begin, _ in ends) // self.first.count
        last = (max(end for _, end in ends) - 1) // self.first.count
        yield from map(self.at, range(first, last + 1))

    def _end(self, bottom: int, right: int) -> int:
        return index(self.together, bottom - 1, right - 1) + 1

    def then(self, other: Run) -> Run | None:
        """Return this run with another one, of the same box, behind it; None if that is none."""
        stride = self.stride if self.repeats > 1 else other.file - self.last_file
        fits = (
            other.first.count == self.first.count
            and other.first.offset == self.first.offset + self.repeats * self.first.count
            and other.file == self.last_file + stride
            and stride > 0
            and (other.repeats == 1 or other.stride == stride)
        )
        return self._replace(repeats=self.repeats + other.repeats, stride=stride) if fits else None


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the same fragments in as few runs as their order allows, each of them once."""
    found: list[Run] = []
    last: dict[Piece, int] = {}
    for run in dict.fromkeys(runs):
        piece = run.first.piece
        longer = found[last[piece]].then(run) if piece in last else None
        if longer is None:
            last[piece] = len(found)
            found.append(run)
        else:
            found[last[piece]] = longer
    return tuple(found)
