"""Boxes of logical tensors, and ranges of their elements. No torch.

A logical tensor bears Hugging Face's name and shape, and belongs to no layout. A rank holds boxes
of it, and ZeRO and checkpoints cut the flattened boxes into ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the logical tensor `name`: rows [row, row + rows) of a parameter.

    `shape` is the logical tensor's, `start` and `size` are the box in it. `transposed`: the logical
    tensor stores [in, out] (Hugging Face's Conv1D in gpt2), the parameter [out, in]. `gain`: the
    logical tensor starts with so many times the values of its parameter's `Init`.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    row: int = 0
    transposed: bool = False
    gain: float = 1.0

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> Piece:
        """Return all of a logical tensor."""
        return cls(name, shape, (0,) * len(shape), shape, transposed=transposed)

    @property
    def rows(self) -> int:
        """The number of the parameter's rows that it takes; a scalar has one."""
        if not self.size:
            return 1
        return self.size[-1] if self.transposed else self.size[0]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.size)

    def box_of(self, logical: Tensor) -> Tensor:
        """Return this piece as it lies in the parameter, cut from the whole logical tensor."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            logical = logical.narrow(dim, start, size)
        return logical.t() if self.transposed else logical

    def in_parameter(self, parameter: Tensor) -> Tensor:
        """Return the view of a parameter that holds this piece. ZeRO-3 must have gathered it."""
        return parameter.narrow(0, self.row, self.rows) if self.size else parameter


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [offset, offset + count) of a piece that is flattened row by row, as it lies in the
    parameter: where it is `transposed`, with its two dimensions swapped."""

    piece: Piece
    offset: int
    count: int

    @classmethod
    def whole(cls, piece: Piece) -> Fragment:
        """Return all of a piece."""
        return cls(piece, 0, piece.numel)
