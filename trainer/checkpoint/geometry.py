"""Ranges of flattened boxes of one logical tensor: where they overlap. No torch.

A box is flattened row by row; its row is what lies behind its first dimension (swapped, where it is transposed). A range of
the flattening is at most three rectangles: the end of a row, whole rows, the beginning of a row. So the elements that two
fragments share, however differently they were cut, are rectangles too.

Coordinates are (row, column) of the logical tensor seen as a matrix, transposed or not as its fragments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trainer.checkpoint.manifest import Fragment


class Rectangle(NamedTuple):
    top: int
    bottom: int  # past the end
    left: int
    right: int  # past the end

    def overlap(self, other: Rectangle) -> Rectangle | None:
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rectangle(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Range:
    """Elements [offset, offset + count) of the flattening of the matrix rows × columns at (top, left)."""

    top: int
    left: int
    rows: int
    columns: int
    offset: int
    count: int

    @classmethod
    def of(cls, fragment: Fragment) -> Range:
        start, size = _as_matrix(fragment.start), _as_matrix(fragment.size, of_sizes=True)
        if fragment.transposed:
            start, size = start[::-1], size[::-1]
        return cls(*start, *size, fragment.offset, fragment.count)

    def rectangles(self) -> Iterator[Rectangle]:
        """What the range covers, without overlap."""
        if not self.count:
            return
        last = self.offset + self.count
        first_row, first_column = divmod(self.offset, self.columns)
        end_row, end_column = divmod(last, self.columns)
        if first_row == end_row:
            yield self._rectangle(first_row, end_row + 1, first_column, end_column)
            return
        if first_column:
            yield self._rectangle(first_row, first_row + 1, first_column, self.columns)
            first_row += 1
        if first_row < end_row:
            yield self._rectangle(first_row, end_row, 0, self.columns)
        if end_column:
            yield self._rectangle(end_row, end_row + 1, 0, end_column)

    def _rectangle(self, first: int, end: int, left: int, right: int) -> Rectangle:
        return Rectangle(self.top + first, self.top + end, self.left + left, self.left + right)

    def index(self, row: int, column: int) -> int:
        """Of an element of the tensor in this range; may lie outside [0, count)."""
        return (row - self.top) * self.columns + (column - self.left) - self.offset


def overlaps(a: Range, b: Range) -> Iterator[Rectangle]:
    """The elements that are in both, each once."""
    for mine in a.rectangles():
        for theirs in b.rectangles():
            if shared := mine.overlap(theirs):
                yield shared


def disjoint(rectangles: Iterable[Rectangle]) -> bool:
    """Whether no element is in two of them."""
    open_ones: list[Rectangle] = []
    for rectangle in sorted(rectangles):
        open_ones = [other for other in open_ones if other.bottom > rectangle.top]
        if any(other.overlap(rectangle) for other in open_ones):
            return False
        open_ones.append(rectangle)
    return True


def _as_matrix(dims: tuple[int, ...], *, of_sizes: bool = False) -> tuple[int, int]:
    """(first dimension, the others flattened). Only matrices are cut along their second dimension."""
    if of_sizes:
        return (dims[0], math.prod(dims[1:])) if dims else (1, 1)
    assert len(dims) <= 2 or not any(dims[1:]), f"a box that starts at {dims}"
    return (dims[0], dims[1] if len(dims) == 2 else 0) if dims else (0, 0)
