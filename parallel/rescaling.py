"""(IA)³ around parallel linear layers: features are multiplied with a trained vector that starts at
1, and the weights are frozen (Liu et al. 2022, arXiv:2205.05638).

Shape letters: N tokens of a micro-batch, I input features, O output features; a capital keeps its
letter when it is local.

Both kinds multiply what lies inside the parallel region, where each rank has its own features of
all tokens, and so it holds the same part of the vector.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from parallel.linear import ColumnParallelLinear, RowParallelLinear, Shard
from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, ShardSpec
from parallel.pieces import Piece
from parallel.rng import Streams

ONE = Init(mean=1.0)


class OutputRescaling(Sharded):
    """Rescaled outputs of a column-parallel layer, Y · l, for outputs of `modules`.

    There is no communication.
    """

    def __init__(self, layer: ColumnParallelLinear, modules: Collection[str]) -> None:
        super().__init__()
        self._declare("scale", layer.local_shards, modules, Group.alone())
        self._declare("shared_scale", layer.shared_shards, modules, layer.copies)
        shards = [*layer.local_shards, *layer.shared_shards]
        self.features = [(shard.features, shard.output.name in modules) for shard in shards]

    def _declare(self, name: str, shards: list[Shard], modules: Collection[str], copies: Group) -> None:
        pieces, rows = [], 0
        for s in (shard for shard in shards if shard.output.name in modules):
            pieces.append(Piece(f"{s.output.name}.ia3_l", (s.output.of, 1), (s.first, 0), (s.features, 1), rows))
            rows += s.features
        if pieces:
            self.declare(name, (rows, 1), ShardSpec(Role.NORM, ONE, tuple(pieces), copies, copies.size > 1, added=True))

    def forward(self, layer: ColumnParallelLinear, x_NI: Tensor, streams: Streams | None) -> Tensor:
        scales = torch.cat([getattr(self, name) for name in ("scale", "shared_scale") if name in self.specs]).flatten()
        scales = scales.to(x_NI.dtype)
        of_shards = iter(scales.split([features for features, adapted in self.features if adapted]))
        ones = scales.new_ones(())
        every = [next(of_shards) if adapted else ones.expand(features) for features, adapted in self.features]
        return layer.plain(x_NI) * torch.cat(every)

    def start_from(self, layer: ColumnParallelLinear) -> None:
        """Do nothing: the vector starts at 1 whatever the layer's weights are."""


class InputRescaling(Sharded):
    """Rescaled inputs, (X · l) Wᵀ, of a row-parallel layer. No communication."""

    scale: nn.Parameter

    def __init__(self, layer: RowParallelLinear) -> None:
        super().__init__()
        local = layer.tp.group.part(layer.in_features, f"{layer.name}: input features")
        first = layer.tp.group.rank * local
        piece = Piece(f"{layer.name}.ia3_l", (1, layer.in_features), (0, first), (1, local))
        self.declare("scale", (1, local), ShardSpec(Role.NORM, ONE, (piece,), Group.alone(), added=True))

    def forward(self, layer: RowParallelLinear, x_NI: Tensor, streams: Streams | None) -> Tensor:
        return layer.plain(x_NI * self.scale.to(x_NI.dtype))

    def start_from(self, layer: RowParallelLinear) -> None:
        """Do nothing: the vector starts at 1 whatever the layer's weights are."""
