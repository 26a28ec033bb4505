"""Normalisation, whole on every tensor rank. D: model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.params import Init, Role, Sharded, whole


class _RMSNorm(torch.autograd.Function):
    """y = n · w with n = x · s, s = 1 / sqrt(mean(x²) + eps); backward: dx = s (dn − n · mean(dn · n)), dn = dy · w.

    Written out because autograd would keep two fp32 copies of the activations: this keeps n in x's format, and took a third
    of the time in fp32 and four fifths in bf16 on a server CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
        normal = (x * scale).to(x.dtype)
        ctx.save_for_backward(normal, weight, scale)
        return normal * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, weight, scale = ctx.saved_tensors
        grad_weight = (grad * normal).flatten(0, -2).sum(0, dtype=scale.dtype)
        grad_normal = grad * weight.to(grad.dtype)
        along = (grad_normal * normal).sum(-1, keepdim=True, dtype=scale.dtype) / normal.shape[-1]
        across = torch.addcmul(grad_normal, normal, along.to(grad.dtype), value=-1.0)
        return (across * scale).to(grad.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(Sharded):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467); statistics in fp32."""

    def __init__(self, hidden_size: int, *, eps: float, name: str) -> None:
        super().__init__()
        self.eps = eps
        shape = (hidden_size,)
        self.declare("weight", shape, whole(f"{name}.weight", shape, role=Role.NORM, init=Init(mean=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


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
