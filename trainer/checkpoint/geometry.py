"""Rectangles, by which fragments of one logical tensor are compared. No torch.

A piece is flattened row by row; its row is what lies behind its first dimension (swapped, if it is
transposed). A range of the flattening is at most three rectangles: the end of a row, whole rows,
the beginning of a row. So the elements that two fragments share, however differently they were cut,
are rectangles too.

Coordinates are (row, column) of the logical tensor seen as a matrix, transposed or not as its
fragments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from parallel.pieces import Fragment, Piece


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    def overlap(self, other: Rectangle) -> Rectangle | None:
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rectangle(top, bottom, left, right) if top < bottom and left < right else None

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return self.height * self.width


def box_of(piece: Piece) -> Rectangle:
    """Return a piece as it is flattened: its first dimension down, the others to the right."""
    assert len(piece.start) <= 2 or not any(piece.start[1:]), f"a box that starts at {piece.start}"
    (top, left, *_), (height, *widths) = (*piece.start, 0, 0), piece.size or (1,)
    width = math.prod(widths)
    if piece.transposed:
        top, left, height, width = left, top, width, height
    return Rectangle(top, top + height, left, left + width)


def rectangles(fragment: Fragment) -> Iterator[Rectangle]:
    """Yield rectangles that cover a fragment without overlap."""
    if not fragment.count:
        return
    box = box_of(fragment.piece)
    first_row, first_column = divmod(fragment.offset, box.width)
    end_row, end_column = divmod(fragment.offset + fragment.count, box.width)

    def within(first: int, end: int, left: int, right: int) -> Rectangle:
        return Rectangle(box.top + first, box.top + end, box.left + left, box.left + right)

    if first_row == end_row:
        yield within(first_row, end_row + 1, first_column, end_column)
        return
    if first_column:
        yield within(first_row, first_row + 1, first_column, box.width)
        first_row += 1
    if first_row < end_row:
        yield within(first_row, end_row, 0, box.width)
    if end_column:
        yield within(end_row, end_row + 1, 0, end_column)


def index(fragment: Fragment, row: int, column: int) -> int:
    """Return the place of a tensor's element in a fragment; outside [0, count) if it is
    elsewhere."""
    box = box_of(fragment.piece)
    return (row - box.top) * box.width + (column - box.left) - fragment.offset


def overlaps(a: Fragment, b: Fragment) -> Iterator[Rectangle]:
    """Yield rectangles of the elements that are in both fragments, each element once."""
    for mine in rectangles(a):
        for theirs in rectangles(b):
            if shared := mine.overlap(theirs):
                yield shared


def disjoint(rectangles: Iterable[Rectangle]) -> bool:
    """Return whether no element is in two of them."""
    open_ones: list[Rectangle] = []
    for rectangle in sorted(rectangles):
        open_ones = [other for other in open_ones if other.bottom > rectangle.top]
        if any(other.overlap(rectangle) for other in open_ones):
            return False
        open_ones.append(rectangle)
    return True
