"""Column- and row-parallel linear layers (Shoeybi et al. 2019, arXiv:1909.08053, §3).

Shape letters: B batch, S sequence, I input features, O output features; a capital keeps its letter when it is local.
Weights are stored [O, I] as torch does, Y = X Wᵀ + b, whatever the logical tensor's orientation.

All layers compute in the format of their input: a weight kept in fp32 (ZeRO-0 in bf16 or fp16) is cast on use, so its
gradient accumulates in fp32; where DeepSpeed already holds low-precision copies the cast is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from parallel.collectives import copy_to_group, reduce_from_group
from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, ShardSpec, whole


@dataclass(frozen=True)
class Output:
    """Output features that a fused layer produces for one purpose, and where they live in Hugging Face's tensors.

    `name` is the Hugging Face module ("model.layers.0.self_attn.q_proj"); they are its features
    [offset, offset + features) of `total` (a module that fuses q, k and v itself is named by all three).
    """

    name: str
    features: int
    offset: int = 0
    total: int | None = None

    @property
    def of(self) -> int:
        return self.features if self.total is None else self.total


class ColumnParallelLinear(Sharded):
    """Y = X Aᵀ + b with the rows of A, the output features, divided: A = [A_1; …; A_p], Y_i = X A_iᵀ + b_i.

    Several outputs (q, k, v or gate, up) are fused in one matrix product. Each is divided on its own, so a rank's weight
    is [its rows of q; its rows of k; its rows of v] at any degree that divides them.

    Forward: X [B, S, I] replicated → Y [B, S, O/p]. Backward: dX = Σ_i dY_i A_i, one all-reduce over `group`.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[Output],
        *,
        bias: bool,
        init: Init,
        transposed: bool,
        group: Group,
    ) -> None:
        super().__init__()
        self.group = group
        self.local_features = [group.part(out.features, f"{out.name}: output features") for out in outputs]
        weights, biases, row = [], [], 0
        for out, local in zip(outputs, self.local_features, strict=True):
            first = out.offset + group.rank * local
            shape, start, size = (out.of, in_features), (first, 0), (local, in_features)
            if transposed:
                shape, start, size = shape[::-1], start[::-1], size[::-1]
            weights.append(Piece(f"{out.name}.weight", shape, start, size, row, transposed))
            biases.append(Piece(f"{out.name}.bias", (out.of,), (first,), (local,), row))
            row += local
        sharded = group.size > 1
        self.declare("weight", (row, in_features), ShardSpec(Role.MATRIX, init, tuple(weights), sharded))
        if bias:
            self.declare("bias", (row,), ShardSpec(Role.BIAS, Init(), tuple(biases), sharded))
        else:
            self.bias = None

    def forward(self, x_BSI: Tensor) -> Tensor:
        x_BSI = copy_to_group(x_BSI, self.group)
        bias = None if self.bias is None else self.bias.to(x_BSI.dtype)
        return functional.linear(x_BSI, self.weight.to(x_BSI.dtype), bias)


class RowParallelLinear(Sharded):
    """Y = X Aᵀ + b with the columns of A, the input features, divided: Y = Σ_i X_i A_iᵀ + b.

    Forward: X_i [B, S, I/p] → Y [B, S, O] replicated, one all-reduce over `group`; the bias is added once, after it.
    Backward: dX_i = dY A_i, no communication.
    """

    def __init__(
        self, in_features: int, out_features: int, *, name: str, bias: bool, init: Init, transposed: bool, group: Group
    ) -> None:
        super().__init__()
        self.group = group
        local = group.part(in_features, f"{name}: input features")
        shape, start, size = (out_features, in_features), (0, group.rank * local), (out_features, local)
        if transposed:
            shape, start, size = shape[::-1], start[::-1], size[::-1]
        piece = Piece(f"{name}.weight", shape, start, size, 0, transposed)
        self.declare("weight", (out_features, local), ShardSpec(Role.MATRIX, init, (piece,), group.size > 1))
        if bias:
            self.declare("bias", (out_features,), whole(f"{name}.bias", (out_features,), role=Role.BIAS, init=Init()))
        else:
            self.bias = None

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO = reduce_from_group(functional.linear(x_BSI, self.weight.to(x_BSI.dtype)), self.group)
        return y_BSO if self.bias is None else y_BSO + self.bias.to(y_BSO.dtype)
