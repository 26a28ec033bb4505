"""Tensor-parallel attention from a target to its source (Vaswani et al. 2017, arXiv:1706.03762,
§3.2.3).

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), D model, H query heads, G key/value heads, K head dim; a capital keeps its letter when it is
local.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.attention import WeightDropout, attend
from parallel.documents import Documents
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.outputs import Output
from parallel.params import Init
from parallel.rng import Streams
from parallel.tensor import TensorParallel


class ParallelCrossAttention(nn.Module):
    """Cross-attention with its heads divided: each tensor rank holds H/p query heads and their
    key/value heads.

    Forward: target X [N, D] → column-parallel Q; source M [N, D] → fused column-parallel K and V →
    attention of the local heads, each target to the source with the same number in the row →
    row-parallel output projection of the target's tokens. Communication: that of the three linear
    layers. With sequence parallelism each half of a row is gathered on its own.

    `recompute`: compute the attention core again in backward, as in `ParallelAttention`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query: Output,
        key_value: Sequence[Output],
        out: str,
        qkv_bias: bool,
        out_bias: bool,
        transposed: bool,
        dropout: float,
        scale: float,
        init: Init,
        out_init: Init,
        tp: TensorParallel,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = tp.group.part(num_heads, "attention heads")
        self.num_kv_heads = tp.group.part(num_kv_heads, "key/value heads")
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = dropout
        self.site = f"{out}.weights"
        self.heads = range(tp.group.rank * self.num_heads, (tp.group.rank + 1) * self.num_heads)
        self.recompute = recompute
        self.query, self.key_value = (
            ColumnParallelLinear(hidden_size, outputs, bias=qkv_bias, init=init, transposed=transposed, tp=tp)
            for outputs in ([query], key_value)
        )
        self.out = RowParallelLinear(
            num_heads * head_dim, hidden_size, name=out, bias=out_bias, init=out_init, transposed=transposed, tp=tp
        )

    def forward(
        self, x_ND: Tensor, documents: Documents, memory_ND: Tensor, sources: Documents, streams: Streams | None
    ) -> Tensor:
        """Return what the target's tokens get from their sources, [N, D] like `x_ND`.

        `memory_ND` is the encoder's output for the `sources`, [N of the source, D]. With `streams`
        None nothing is dropped.
        """
        q_BSHK = self.query(x_ND, streams).view(*documents.shape, self.num_heads, self.head_dim)
        kv_BTNK = self.key_value(memory_ND, streams).view(*sources.shape, 2 * self.num_kv_heads, self.head_dim)
        if self.recompute and torch.is_grad_enabled():
            y_BSHK = checkpoint(
                self._core, q_BSHK, kv_BTNK, documents, sources, streams, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y_BSHK = self._core(q_BSHK, kv_BTNK, documents, sources, streams)
        return self.out(y_BSHK.flatten(2).flatten(0, 1), streams)

    def _core(
        self, q_BSHK: Tensor, kv_BTNK: Tensor, documents: Documents, sources: Documents, streams: Streams | None
    ) -> Tensor:
        k_BTGK, v_BTGK = kv_BTNK.chunk(2, dim=2)
        dropped = None
        if self.dropout and streams is not None:
            dropped = WeightDropout(rate=self.dropout, streams=streams, site=self.site, heads=self.heads)
        return attend(
            *(q_BSHK, k_BTGK, v_BTGK, documents),
            sources=sources,
            causal=False,
            scale=self.scale,
            dropout=dropped,
            share_calls=True,
        )
