"""Relative positions as a bias on the logits of attention (Raffel et al. 2020, arXiv:1910.10683,
§2.1).

Shape letters: H query heads (this rank's), S queries, T keys, L tokens of a row, X = 2L − 1
distances from a query to a key, from −(L − 1) on.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, ShardSpec
from parallel.pieces import Piece
from parallel.tensor import TensorParallel


class RelativeBias(Sharded):
    """A table [buckets, H]: the bias that a head adds to a logit, by the bucket of the distance
    from query to key.

    Each tensor rank has the columns of its heads and sees whole sequences, so nothing is
    communicated. Forward: L → [H, X], to be laid out by `by_place`. Distances are within a
    document, so it does not matter where a document begins.
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
        """Declare this rank's columns of the table, or borrow those of another layer.

        `num_heads`: of all ranks together. `tied_to`: the layer whose table this one uses too.
        `tied_over`: the ranks whose pipeline stages use the table, if there are several.
        """
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
        """Return the bias of each distance, [H, X], for rows of `length` (L) tokens."""
        rows_X = buckets_of_distances(length, self.buckets, self.furthest, self.causal, self.weight.device)
        return functional.embedding(rows_X, self.weight).t()


@lru_cache(maxsize=8)  # one entry for each half of a network, in training and in evaluation
def buckets_of_distances(length: int, buckets: int, furthest: int, causal: bool, device: torch.device) -> Tensor:
    """Return the bucket of each distance, int64 [X].

    Each bucket of the first half holds one distance. Those of the second half hold ever more, with
    ends that grow exponentially, and the last holds all distances from `furthest` on. With
    `causal`, keys behind the query are never seen; without, they have as many buckets of their own.
    """
    signed_X = torch.arange(1 - length, length, device="cpu")
    if causal:
        first_X, distances_X = torch.zeros_like(signed_X), (-signed_X).clamp(min=0)
    else:
        buckets //= 2
        first_X, distances_X = (signed_X > 0) * buckets, signed_X.abs()
    single = buckets // 2
    # In fp32 on the CPU, as when the published weights were trained, so that a distance on the
    # border of two buckets rounds to the same side.
    octaves_X = torch.log(distances_X.clamp(min=single).float() / single) / math.log(furthest / single)
    shared_X = (single + (octaves_X * (buckets - single)).long()).clamp(max=buckets - 1)
    return (first_X + torch.where(distances_X < single, distances_X, shared_X)).to(device)


def by_place(bias_HX: Tensor, queries: range, keys: range) -> Tensor:
    """Return the bias of queries and keys at these positions of a document, [H, S, T]."""
    middle = bias_HX.shape[1] // 2  # distance 0
    nearest, furthest = keys.start - queries.stop + 1, keys.stop - queries.start - 1
    windows_HST = bias_HX[:, middle + nearest : middle + furthest + 1].unfold(1, len(keys), 1)
    return windows_HST.flip(1)  # the first window belongs to the last query
