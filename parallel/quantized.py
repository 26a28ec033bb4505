"""Frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, §3).

A row of a weight [O, I] is cut into blocks of 64 neighbours along I. A block is stored as its
largest magnitude, in fp32, and one code for each element: the index of element / magnitude in a
table of values.

| format | values | bits per weight, magnitudes included |
|---|---|---|
| nf4 | the 16 quantiles of a normal distribution (the paper's appendix E) | 4.5 |
| int8 | −127/127, …, 127/127 | 8.5 |

Two codes of nf4 share a byte, the first in its upper half. Bytes and magnitudes are the same as in
bitsandbytes. Blocks never cross a row, and a shard must hold whole blocks, so what is stored does
not depend on how many ranks divide the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.params import ShardSpec
from parallel.pieces import Piece

BLOCK = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CODES_PER_BYTE = {"nf4": 2, "int8": 1}


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight [O, I] that is never trained.

    `spec`: the spec the weight would have as a parameter. `codes` [O, I or I / 2]; `magnitudes` [O,
    I / 64] fp32.
    """

    spec: ShardSpec
    form: str
    codes: Tensor
    magnitudes: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor, spec: ShardSpec, form: str) -> QuantizedWeight:
        return cls(spec, form, *quantize(weight_OI, form))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.codes, self.magnitudes, self.form).to(dtype)

    @property
    def seen(self) -> None:
        """Return None: autograd does not see the weight (`parallel.linear.Weight`)."""
        return

    def value(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.dequantized(dtype)

    def gradient(self, dy_NO: Tensor, x_NI: Tensor) -> None:
        """Return None: the weight is never trained."""
        return

    @property
    def numel(self) -> int:
        """The number of elements of the weight, not of its codes."""
        return self.codes.numel() * CODES_PER_BYTE[self.form]

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.magnitudes.nbytes

    def spec_of(self, per_row: int) -> ShardSpec:
        """Return the spec of a tensor [O, I / per_row] that holds one value for each `per_row`
        neighbours.

        The shape is [O, I / per_row] whatever the orientation of the logical tensor.
        """
        return replace(self.spec, pieces=tuple(_condensed(piece, per_row) for piece in self.spec.pieces))

    @property
    def stored(self) -> dict[str, tuple[ShardSpec, Tensor]]:
        """The tensors that a checkpoint keeps of the weight, with their specs, by name."""
        return {
            "codes": (self.spec_of(CODES_PER_BYTE[self.form]), self.codes),
            "magnitudes": (self.spec_of(BLOCK), self.magnitudes),
        }


def quantize(weight_OI: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return (codes, magnitudes). ValueError if I is not a multiple of 64."""
    rows, features = weight_OI.shape
    if features % BLOCK:
        raise ValueError(f"{features} input features are not a multiple of {BLOCK}, the number quantized together")
    blocks = weight_OI.float().view(rows, -1, BLOCK)
    magnitudes = blocks.abs().amax(-1)
    share = torch.where(magnitudes > 0, 1.0 / magnitudes, 0.0).unsqueeze(-1) * blocks
    if form == "int8":
        return (share * 127.0).round().to(torch.int8).view(rows, features), magnitudes
    table = torch.tensor(NF4, device=weight_OI.device)
    codes = torch.bucketize(share, (table[:-1] + table[1:]) / 2).to(torch.uint8).view(rows, -1, 2)
    return (codes[..., 0] << 4) | codes[..., 1], magnitudes


def dequantize(codes: Tensor, magnitudes: Tensor, form: str) -> Tensor:
    """Return the weight, [O, I] fp32."""
    rows = codes.shape[0]
    if form == "int8":
        values = codes.float() / 127.0
    else:
        table = torch.tensor(NF4, device=codes.device)
        values = torch.stack([table[(codes >> 4).long()], table[(codes & 15).long()]], -1)
    return (values.view(rows, -1, BLOCK) * magnitudes.unsqueeze(-1)).view(rows, -1)


def _condensed(piece: Piece, per_row: int) -> Piece:
    """Return the piece [O, I / per_row] of a tensor with one value for each `per_row` neighbours of
    this piece."""
    (rows, features), (row, first), (height, width) = (
        box[::-1] if piece.transposed else box for box in (piece.shape, piece.start, piece.size)
    )
    assert features % per_row == first % per_row == width % per_row == 0, "a shard cuts a block"
    shape, start, size = (rows, features // per_row), (row, first // per_row), (height, width // per_row)
    return Piece(piece.name, shape, start, size, piece.row)
