"""Normalisation, whole on every tensor rank. D: model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from parallel.params import Init, Role, Sharded, whole


class RMSNorm(Sharded):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467); statistics in fp32."""

    def __init__(self, hidden_size: int, *, eps: float, name: str) -> None:
        super().__init__()
        self.eps = eps
        shape = (hidden_size,)
        self.declare("weight", shape, whole(f"{name}.weight", shape, role=Role.NORM, init=Init(mean=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


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
