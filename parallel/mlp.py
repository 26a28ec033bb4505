"""The tensor-parallel feed-forward layer. Shape letters: N tokens, D model, F ffn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.autograd import TensorFunction
from parallel.fusable import fusable
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.outputs import Output
from parallel.params import Init
from parallel.rng import Streams, dropout
from parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Activation:
    """A function of single numbers, and its gradient: `backward(grad, x)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


ATEN = torch.ops.aten
ACTIVATIONS = {
    "gelu": Activation(functional.gelu, ATEN.gelu_backward),
    "gelu_tanh": Activation(partial(functional.gelu, approximate="tanh"), partial(ATEN.gelu_backward, approximate="tanh")),
    "relu": Activation(functional.relu, partial(ATEN.threshold_backward, threshold=0)),
    "silu": Activation(functional.silu, ATEN.silu_backward),
}


class _Gated(TensorFunction):
    """The product act(G) · U of the halves of the last dim, [N, 2 F] → [N, F].

    Written out because autograd would keep act(G) as well, a sixth of what a Llama layer keeps, and
    join the gradients of the halves by a copy. Here backward computes act(G) again and writes both
    into one tensor; the numbers are the same to the bit.
    """

    @staticmethod
    def forward(ctx: Any, h_NF: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(h_NF)
        ctx.activation = activation
        return _gated(h_NF, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        (h_NF,) = ctx.saved_tensors
        return _gated_backward(grad_NF, h_NF, ctx.activation), None


@fusable
def _gated(h_NF: Tensor, activation: Activation) -> Tensor:
    gate_NF, up_NF = h_NF.chunk(2, dim=-1)
    return activation.forward(gate_NF).mul_(up_NF)


def _gated_backward_in_place(grad_NF: Tensor, h_NF: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of h, with no other tensor of its size at any moment."""
    gate_NF, up_NF = h_NF.chunk(2, dim=-1)
    grad_h_NF = torch.empty_like(h_NF)
    grad_gate_NF, grad_up_NF = grad_h_NF.chunk(2, dim=-1)
    torch.mul(grad_NF, up_NF, out=grad_up_NF)  # for a moment
    activation.backward(grad_up_NF, gate_NF, grad_input=grad_gate_NF)
    torch.mul(grad_NF, activation.forward(gate_NF), out=grad_up_NF)
    return grad_h_NF


@partial(fusable, unfused=_gated_backward_in_place)
def _gated_backward(grad_NF: Tensor, h_NF: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of h, as a compiler reads it best."""
    gate_NF, up_NF = h_NF.chunk(2, dim=-1)
    return torch.cat([activation.backward(grad_NF * up_NF, gate_NF), grad_NF * activation.forward(gate_NF)], dim=-1)


class ParallelMLP(nn.Module):
    """A feed-forward layer: act(X Aᵀ) Bᵀ, or gated (act(X Gᵀ) · X Uᵀ) Bᵀ with G and U fused
    (Shazeer 2020, arXiv:2002.05202).

    Column-parallel in, row-parallel out: the F dim is divided and the activation needs no
    communication. One all-reduce forward and one backward; with sequence parallelism an all-gather
    and a reduce-scatter each way.

    `inputs` is [up] or [gate, up]. `dropout`: rate on the input of B.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        inputs: Sequence[Output],
        out: str,
        bias: bool,
        transposed: bool,
        dropout: float = 0.0,
        init: Init,
        out_init: Init,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gated = len(inputs) == 2
        self.dropout = dropout
        self.site = f"{out}.inputs"
        self.features = range(tp.group.rank * ffn_size // tp.group.size, (tp.group.rank + 1) * ffn_size // tp.group.size)
        self.ffn_size = ffn_size
        self.up = ColumnParallelLinear(hidden_size, inputs, bias=bias, init=init, transposed=transposed, tp=tp)
        self.down = RowParallelLinear(ffn_size, hidden_size, name=out, bias=bias, init=out_init, transposed=transposed, tp=tp)

    def forward(self, x_ND: Tensor, streams: Streams | None = None) -> Tensor:
        """Return [N, D]. With `streams` None nothing is dropped."""
        h_NF = self.up(x_ND, streams)
        if self.gated:
            h_NF = _Gated.apply(h_NF, self.activation)
        else:
            h_NF = self.activation.forward(h_NF)
        return self.down(self._dropped(h_NF, streams), streams)

    def _dropped(self, h_NF: Tensor, streams: Streams | None) -> Tensor:
        """Drop features: the mask is drawn for all F of them, and each rank takes the part of its
        own."""
        if not self.dropout or streams is None:
            return h_NF
        shape = h_NF.shape[0] // len(streams.seeds), self.ffn_size
        keeps_NF = streams.keeps_features(self.site, self.dropout, shape, slice(0, h_NF.shape[0]), h_NF.device)
        return dropout(h_NF, keeps_NF[:, self.features.start : self.features.stop], self.dropout)
