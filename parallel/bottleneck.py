"""Bottleneck adapters behind row-parallel layers: Z = Y + gelu(Y Dᵀ + d) Uᵀ + u, with the layer
that gives Y frozen (Houlsby et al. 2019, arXiv:1902.00751, §2.1, with the activation of its code).

Shape letters: N tokens of a micro-batch, or this rank's share of them; O output features.

Y is what leaves a tensor-parallel region. An adapter is therefore whole on every rank and sees this
rank's tokens: with sequence parallelism its gradients are partial, without it they are equal on all
ranks.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from parallel.linear import ReplicatedLinear, RowParallelLinear
from parallel.params import Init
from parallel.rng import Streams


class Bottleneck(nn.Module):
    """An adapter, [N, O] → [N, O], without communication. U and u start at 0, so that Z starts as
    Y; D starts as torch initializes a linear layer."""

    def __init__(self, layer: RowParallelLinear, size: int) -> None:
        super().__init__()
        features, name, tp = layer.out_features, layer.name, layer.tp
        start = Init(bound=1.0 / math.sqrt(features))
        self.down = ReplicatedLinear(features, size, name=f"{name}.adapter_down", init=start, tp=tp, added=True)
        self.up = ReplicatedLinear(size, features, name=f"{name}.adapter_up", init=Init(), tp=tp, added=True)

    def forward(self, layer: RowParallelLinear, x_NI: Tensor, streams: Streams | None) -> Tensor:
        y_NO = layer.plain(x_NI)
        return y_NO + self.up(functional.gelu(self.down(y_NO)))

    def start_from(self, layer: RowParallelLinear) -> None:
        """Do nothing: the adapter starts the same whatever the layer's weights are."""
