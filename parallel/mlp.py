"""The tensor-parallel feed-forward layer. Shape letters: N tokens, D model, F ffn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.outputs import Output
from parallel.params import Init
from parallel.rng import Streams, dropout
from parallel.tensor import TensorParallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


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
            gate_NF, up_NF = h_NF.chunk(2, dim=-1)
            h_NF = self.activation(gate_NF) * up_NF
        else:
            h_NF = self.activation(h_NF)
        return self.down(self._dropped(h_NF, streams), streams)

    def _dropped(self, h_NF: Tensor, streams: Streams | None) -> Tensor:
        """Drop features: the mask is drawn for all F of them, and each rank takes the part of its
        own."""
        if not self.dropout or streams is None:
            return h_NF
        shape = h_NF.shape[0] // len(streams.seeds), self.ffn_size
        keeps_NF = streams.keeps_features(self.site, self.dropout, shape, slice(0, h_NF.shape[0]), h_NF.device)
        return dropout(h_NF, keeps_NF[:, self.features.start : self.features.stop], self.dropout)
