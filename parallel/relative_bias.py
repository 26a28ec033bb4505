"""Relative positions as a bias on the logits of attention (Raffel et al. 2020, arXiv:1910.10683, §2.1).

Shape letters: H query heads (this rank's), S queries, T keys, L tokens of a row, X = 2L − 1 distances from a query to a key,
from −(L − 1) on.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, ShardSpec
from parallel.tensor import TensorParallel


class RelativeBias(Sharded):
    """A table [buckets, H]: what a head adds to the logit of a query and a key whose distance is in a bucket.

    Each tensor rank has the columns of its heads, and sees whole sequences, so nothing is communicated. Forward: → [H, X], to
    be laid out by `by_place`. A distance is within a document: where each begins does not matter.
    """

    weight: nn.Parameter

    def __init__(
        self,
        *,
        num_heads: int,
        buckets: int,
        furthest: int,
        causal: bool,
        name: str,
        init: Init,
        tp: TensorParallel,
        tied_to: RelativeBias | None = None,
        tied_over: Group | None = None,
    ) -> None:
        """`num_heads`: of all ranks. `tied_to`: another layer's bias, whose table is this one's too. `tied_over`: the ranks
        whose pipeline stages use it, where several do."""
        super().__init__()
        self.buckets, self.furthest, self.causal = buckets, furthest, causal
        if tied_to is not None:
            self.borrow("weight", tied_to)
            return
        heads = tp.group.part(num_heads, "attention heads")
        piece = Piece(f"{name}.weight", (buckets, num_heads), (0, tp.group.rank * heads), (buckets, heads))
        spec = ShardSpec(Role.EMBEDDING, init, (piece,), tied_over or Group.alone(), tied=tied_over is not None)
        self.declare("weight", (buckets, heads), spec)

    def forward(self, length: int) -> Tensor:
        """`length`: L."""
        rows_X = buckets_of_distances(length, self.buckets, self.furthest, self.causal, self.weight.device)
        return functional.embedding(rows_X, self.weight).t()


@lru_cache(maxsize=8)  # of each half of a network, in training and in evaluation
def buckets_of_distances(length: int, buckets: int, furthest: int, causal: bool, device: torch.device) -> Tensor:
    """The bucket of each distance, int64 [X].

    The first half of the buckets have one distance each, the second half ever more of them (their ends grow like powers), the
    last all from `furthest` on. `causal`: keys behind the query are never seen; else they have buckets of their own, as many.
    """
    signed_X = torch.arange(1 - length, length, device="cpu")
    if causal:
        first_X, distances_X = torch.zeros_like(signed_X), (-signed_X).clamp(min=0)
    else:
        buckets //= 2
        first_X, distances_X = (signed_X > 0) * buckets, signed_X.abs()
    single = buckets // 2
    # In fp32 on the CPU, as the published weights were trained: a distance where two buckets meet rounds to the same side.
    octaves_X = torch.log(distances_X.clamp(min=single).float() / single) / math.log(furthest / single)
    shared_X = (single + (octaves_X * (buckets - single)).long()).clamp(max=buckets - 1)
    return (first_X + torch.where(distances_X < single, distances_X, shared_X)).to(device)


def by_place(bias_HX: Tensor, queries: range, keys: range) -> Tensor:
    """The bias of queries and keys at these places of a document, [H, S, T]."""
    middle = bias_HX.shape[1] // 2  # distance 0
    nearest, furthest = keys.start - queries.stop + 1, keys.stop - queries.start - 1
    windows_HST = bias_HX[:, middle + nearest : middle + furthest + 1].unfold(1, len(keys), 1)
    return windows_HST.flip(1)  # the first window was the last query's
