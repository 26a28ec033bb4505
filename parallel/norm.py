"""Normalisation, its weights whole on every tensor rank.

Shape letters: B batch, S sequence, D model, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.collectives import copy_to_group
from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, whole


class _RMSNorm(torch.autograd.Function):
    """y = n · w with n = x · s, s = 1 / sqrt(mean(x²) + eps); backward: dx = s (dn − n · mean(dn · n)), dn = dy · w.

    The mean is over the last dim; w has as many of the last dims of x as it needs. With an offset, w is weight + offset in
    fp32: 1 + w in bf16 would lose every w below 1/256.
    Written out because autograd would keep two fp32 copies of the activations: this keeps n in x's format, and took a third
    of the time in fp32 and four fifths in bf16 on a server CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
        normal = (x * scale).to(x.dtype)
        ctx.save_for_backward(normal, weight, scale)
        ctx.offset = offset
        return (normal * _gain(weight, x.dtype, offset)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normal, weight, scale = ctx.saved_tensors
        grad_weight = (grad * normal).flatten(0, -1 - weight.dim()).sum(0, dtype=scale.dtype)
        grad_normal = (grad * _gain(weight, grad.dtype, ctx.offset)).to(grad.dtype)
        along = (grad_normal * normal).sum(-1, keepdim=True, dtype=scale.dtype) / normal.shape[-1]
        across = torch.addcmul(grad_normal, normal, along.to(grad.dtype), value=-1.0)
        return (across * scale).to(grad.dtype), grad_weight.to(weight.dtype), None, None


def _gain(weight: Tensor, dtype: torch.dtype, offset: float) -> Tensor:
    return weight.to(torch.promote_types(dtype, torch.float32)) + offset if offset else weight.to(dtype)


class RMSNorm(Sharded):
    """x / sqrt(mean(x²) + eps) · (weight + offset) (Zhang & Sennrich 2019, arXiv:1910.07467); statistics in fp32."""

    def __init__(self, hidden_size: int, *, eps: float, name: str, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        shape = (hidden_size,)
        self.declare("weight", shape, whole(f"{name}.weight", shape, role=Role.NORM, init=Init(mean=1.0 - offset)))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, self.offset)


class QueryKeyNorm(Sharded):
    """RMSNorm of each head's queries and keys, one weight [K] for all query heads and one for all key heads
    (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442).

    The weights are whole on every rank, but a rank normalises only its own heads. Forward: no communication. Backward:
    the partial weight gradients of both are summed over `group`, one all-reduce of 2 K numbers.
    """

    def __init__(self, head_dim: int, *, eps: float, query: str, key: str, group: Group) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        for what, name in (("query", query), ("key", key)):
            spec = whole(f"{name}.weight", (head_dim,), role=Role.NORM, init=Init(mean=1.0))
            self.declare(what, (head_dim,), spec)

    def forward(self, qk_BSNK: Tensor, num_heads: int) -> Tensor:
        """[B, S, H + G, K] → the same, normalised; the first `num_heads` are queries."""
        query_K, key_K = copy_to_group(torch.stack([self.query, self.key]), self.group)
        num_keys = qk_BSNK.shape[2] - num_heads
        weight_NK = torch.cat([query_K.expand(num_heads, -1), key_K.expand(num_keys, -1)])
        return _RMSNorm.apply(qk_BSNK, weight_NK, self.eps)


class LayerNorm(Sharded):
    """(x − mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, hidden_size: int, *, eps: float, bias: bool, name: str) -> None:
        super().__init__()
        self.eps = eps
        shape = (hidden_size,)
        self.declare("weight", shape, whole(f"{name}.weight", shape, role=Role.NORM, init=Init(mean=1.0)))
        if bias:
            self.declare("bias", shape, whole(f"{name}.bias", shape, role=Role.NORM, init=Init()))
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
