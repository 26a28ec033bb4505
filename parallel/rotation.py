"""The rotation of queries and keys by their positions (rotary embedding).

Shape letters: B batch, S sequence, H query heads, G key/value heads, K head dim, N heads that stand
side by side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.autograd import TensorsFunction
from parallel.block_attention import reads_by_head
from parallel.fusable import fusable


class Rotate(TensorsFunction):
    """X [B, S, H + G + …, K] → the H queries and the G keys, with the halves of the last dim
    rotated, (a, b) → (a cos − b sin, b cos + a sin), and what is behind them as it is. Backward
    rotates the other way.

    Written out because autograd would keep four intermediates per layer, of which only cos and sin
    are needed, and join the gradients of the parts by a copy. All parts are copies: a view of the
    last would keep all of X.
    """

    @staticmethod
    def forward(ctx: Any, x_BSNK: Tensor, cos: Tensor, sin: Tensor, H: int, G: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BSNK, cos, sin, H, G, reads_by_head(x_BSNK, H // G))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BSHK: Tensor, dk_BSGK: Tensor, grad_others: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _rotated_back(dq_BSHK, dk_BSGK, grad_others, *ctx.saved_tensors), None, None, None, None


def _as_attention_reads(like_BSNK: Tensor, by_head: bool) -> Tensor:
    """Return an empty tensor of this shape, by head in memory or by token."""
    B, S, N, K = like_BSNK.shape
    return like_BSNK.new_empty(B, N, S, K).transpose(1, 2) if by_head else like_BSNK.new_empty(B, S, N, K)


def _rotate(into: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = x.chunk(2, dim=-1)
    into_a, into_b = into.chunk(2, dim=-1)
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin)


def _rotated_in_place(x_BSNK: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, by_head: bool) -> tuple[Tensor, ...]:
    q_BSHK, k_BSGK, others = (_as_attention_reads(x, by_head) for x in x_BSNK.tensor_split([H, H + G], dim=2))
    _rotate(q_BSHK, x_BSNK[:, :, :H], cos, sin)
    _rotate(k_BSGK, x_BSNK[:, :, H : H + G], cos, sin)
    return q_BSHK, k_BSGK, others.copy_(x_BSNK[:, :, H + G :])


@partial(fusable, unfused=_rotated_in_place)
def _rotated(x_BSNK: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, by_head: bool) -> tuple[Tensor, ...]:
    """Return queries and keys rotated, and what is behind them, as a compiler reads it best."""
    q, k, others = x_BSNK.tensor_split([H, H + G], dim=2)
    parts = _turned(q, cos, sin), _turned(k, cos, sin), others
    if by_head:
        return tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts)
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def _rotated_back_in_place(dq_BSHK: Tensor, dk_BSGK: Tensor, grad_others: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    grads = dq_BSHK, dk_BSGK, grad_others
    sizes = [grad.shape[2] for grad in grads]
    grad_BSNK = dq_BSHK.new_empty(*dq_BSHK.shape[:2], sum(sizes), dq_BSHK.shape[3])
    into_q, into_k, into_others = grad_BSNK.split(sizes, dim=2)
    _rotate(into_q, dq_BSHK, cos, -sin)
    _rotate(into_k, dk_BSGK, cos, -sin)
    into_others.copy_(grad_others)
    return grad_BSNK


@partial(fusable, unfused=_rotated_back_in_place)
def _rotated_back(dq_BSHK: Tensor, dk_BSGK: Tensor, grad_others: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([_turned(dq_BSHK, cos, -sin), _turned(dk_BSGK, cos, -sin), grad_others], dim=2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
