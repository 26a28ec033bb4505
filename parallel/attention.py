"""Tensor-parallel self-attention over packed documents.

Shape letters: B batch, S sequence, D model, H query heads, G key/value heads, K head dim; a capital keeps its letter
when it is local.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from parallel.mesh import Group
from parallel.params import Init

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Documents:
    """Where the documents of each packed row lie: per row their lengths, which sum to S.

    They travel beside the tokens to every layer: documents do not attend to each other, and positions restart at 0.
    """

    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def whole_rows(cls, rows: int, seq_len: int) -> Documents:
        return cls(((seq_len,),) * rows)

    @cached_property
    def positions_BS(self) -> Tensor:
        """Place of each token in its document, int64 [B, S]."""
        return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in self.lengths])

    def runs(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Neighbouring rows with the same boundaries, and those boundaries: what one batched call can attend to."""
        for lengths, group in groupby(enumerate(self.lengths), key=lambda row: row[1]):
            rows = [index for index, _ in group]
            ends = list(accumulate(lengths))
            spans = tuple(slice(end - n, end) for end, n in zip(ends, lengths, strict=True))
            yield slice(rows[0], rows[-1] + 1), spans


class _Rotate(torch.autograd.Function):
    """Rotate the halves of the last dim: (a, b) → (a cos − b sin, b cos + a sin). Backward: rotate the other way.

    Written out because autograd would keep four intermediates per layer for what needs only cos and sin.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def attend(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents: Documents, *, causal: bool, dropout: float) -> Tensor:
    """softmax(Q Kᵀ / √K) V inside each document; [B, S, H, K].

    One call per document, so a token of one document cannot change another by even one bit, no mask is materialised,
    and short documents cost the square of their own length only.
    """
    rows = []
    for batch, spans in documents.runs():
        parts = [
            functional.scaled_dot_product_attention(
                q_BSHK[batch, span].transpose(1, 2),
                k_BSGK[batch, span].transpose(1, 2),
                v_BSGK[batch, span].transpose(1, 2),
                is_causal=causal,
                dropout_p=dropout,
                enable_gqa=q_BSHK.shape[2] != k_BSGK.shape[2],
            ).transpose(1, 2)
            for span in spans
        ]
        rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=0)


class ParallelAttention(torch.nn.Module):
    """Self-attention with its heads divided: each tensor rank holds H/p query heads and their G/p key/value heads.

    Forward: X [B, S, D] replicated → fused column-parallel Q, K, V → attention of the local heads, no communication →
    row-parallel output projection, one all-reduce. Backward: one all-reduce, of dX.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query: Output,
        key: Output,
        value: Output,
        out: str,
        qkv_bias: bool,
        out_bias: bool,
        transposed: bool,
        dropout: float,
        causal: bool,
        init: Init,
        out_init: Init,
        group: Group,
    ) -> None:
        super().__init__()
        self.num_heads = group.part(num_heads, "attention heads")
        self.num_kv_heads = group.part(num_kv_heads, "key/value heads")
        self.head_dim = head_dim
        self.dropout = dropout
        self.causal = causal
        self.qkv = ColumnParallelLinear(
            hidden_size, [query, key, value], bias=qkv_bias, init=init, transposed=transposed, group=group
        )
        self.out = RowParallelLinear(
            num_heads * head_dim, hidden_size, name=out, bias=out_bias, init=out_init, transposed=transposed, group=group
        )

    def forward(self, x_BSD: Tensor, documents: Documents, rotation: Rotation | None) -> Tensor:
        H, G = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_BSD).unflatten(-1, (H + 2 * G, self.head_dim))
        qk, v_BSGK = qkv.split([H + G, G], dim=2)
        if rotation is not None:
            qk = _Rotate.apply(qk, *rotation)
        q_BSHK, k_BSGK = qk.split([H, G], dim=2)
        dropout = self.dropout if self.training else 0.0
        y_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, documents, causal=self.causal, dropout=dropout)
        return self.out(y_BSHK.flatten(2))
