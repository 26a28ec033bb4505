"""Normalisation layers, whose weights are whole on every tensor rank.

With sequence parallelism a rank normalises its own tokens only, so the gradients of the weights are
partial.

Shape letters: B batch, S sequence, D model, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.autograd import TensorFunction
from parallel.fusable import fusable
from parallel.params import Init, Role, Sharded, whole
from parallel.tensor import TensorParallel


class _RMSNorm(TensorFunction):
    """y = n · w with n = x · s, s = 1 / sqrt(mean(x²) + eps); backward: dx = s (dn − n · mean(dn ·
    n)), dn = dy · w.

    The mean is over the last dim; w has as many of the last dims of x as it needs. With an offset,
    w is weight + offset in fp32: 1 + weight in bf16 would lose every weight below 1/256.

    Written out because autograd would keep two fp32 copies of the activations. This keeps n in x's
    format, and on a server CPU takes a third of the time in fp32 and four fifths in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        y, normal, scale = _normalised(x, weight, eps, offset)
        ctx.save_for_backward(normal, weight, scale)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        normal, weight, scale = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]  # else frozen
        return *_normalised_backward(grad, normal, weight, scale, ctx.offset, wants_weight), None, None


@fusable
def _normalised(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, n and s."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
    normal = (x * scale).to(x.dtype)
    return (normal * _gain(weight, x.dtype, offset)).to(x.dtype), normal, scale


@fusable
def _normalised_backward(
    grad: Tensor, normal: Tensor, weight: Tensor, scale: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dx, and dw where it is wanted."""
    grad_weight = None
    if wants_weight:
        grad_weight = (grad * normal).flatten(0, -1 - weight.dim()).sum(0, dtype=scale.dtype).to(weight.dtype)
    grad_normal = (grad * _gain(weight, grad.dtype, offset)).to(grad.dtype)
    along = (grad_normal * normal).sum(-1, keepdim=True, dtype=scale.dtype) / normal.shape[-1]
    across = torch.addcmul(grad_normal, normal, along.to(grad.dtype), value=-1.0)
    return (across * scale).to(grad.dtype), grad_weight


def _gain(weight: Tensor, dtype: torch.dtype, offset: float) -> Tensor:
    return weight.to(torch.promote_types(dtype, torch.float32)) + offset if offset else weight.to(dtype)


class RMSNorm(Sharded):
    """RMSNorm: x / sqrt(mean(x²) + eps) · (weight + offset), statistics in fp32 (Zhang & Sennrich
    2019, arXiv:1910.07467)."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, *, eps: float, name: str, tp: TensorParallel, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        _declare(self, "weight", f"{name}.weight", hidden_size, 1.0 - offset, tp, partial=tp.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, self.offset)


class QueryKeyNorm(Sharded):
    """RMSNorm of each head's queries and keys, with one weight [K] for all query heads and one for
    all key heads (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442).

    The weights are whole on every rank, but a rank normalises only its own heads, so their
    gradients are partial.
    """

    query: nn.Parameter
    key: nn.Parameter

    def __init__(self, head_dim: int, *, eps: float, query: str, key: str, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        _declare(self, "query", f"{query}.weight", head_dim, 1.0, tp, partial=True)
        _declare(self, "key", f"{key}.weight", head_dim, 1.0, tp, partial=True)

    def forward(self, qk_BSNK: Tensor, num_heads: int) -> Tensor:
        """Return queries and keys [B, S, H + G, K] normalised, in the same shape. The first
        `num_heads` are queries."""
        num_keys = qk_BSNK.shape[2] - num_heads
        weight_NK = torch.cat([self.query.expand(num_heads, -1), self.key.expand(num_keys, -1)])
        return _RMSNorm.apply(qk_BSNK, weight_NK, self.eps)


class LayerNorm(Sharded):
    """LayerNorm: (x − mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016,
    arXiv:1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, *, eps: float, bias: bool, name: str, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        _declare(self, "weight", f"{name}.weight", hidden_size, 1.0, tp, partial=tp.sequence)
        if bias:
            _declare(self, "bias", f"{name}.bias", hidden_size, 0.0, tp, partial=tp.sequence)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


def _declare(norm: Sharded, what: str, name: str, features: int, mean: float, tp: TensorParallel, *, partial: bool) -> None:
    spec = whole(name, (features,), role=Role.NORM, init=Init(mean=mean), copies=tp.group, partial=partial)
    norm.declare(what, (features,), spec)
