"""Freezing the network and putting what is trained beside it, block by block, before any storage is there."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.low_rank import ColumnLowRank, LowRank, RowLowRank
from trainer.model.config import TransformerConfig
from trainer.sections import Tuning
from trainer.tuning.targets import targeted_modules


def adaptation(tuning: Tuning, config: TransformerConfig) -> Callable[[nn.Module], None]:
    """What a `Stage` does to each of its blocks."""
    if tuning.method is None:
        return lambda block: None
    modules = frozenset(targeted_modules(tuning, config))
    keys = LowRank(tuning.rank, scale_of(tuning), tuning.dropout)

    def adapt(block: nn.Module) -> None:
        block.requires_grad_(False)
        for layer in list(block.modules()):
            if isinstance(layer, ColumnParallelLinear):
                if any(shard.output.name in modules for shard in (*layer.local_shards, *layer.shared_shards)):
                    layer.adapter = ColumnLowRank(layer, modules, keys)
            elif isinstance(layer, RowParallelLinear) and layer.name in modules:
                layer.adapter = RowLowRank(layer, keys)

    return adapt


def scale_of(tuning: Tuning) -> float:
    """alpha / r (Hu et al. 2021, arXiv:2106.09685, §4.1), or alpha / √r, with which the learning rate need not change with the
    rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    return tuning.alpha / (math.sqrt(tuning.rank) if tuning.rank_stabilized else tuning.rank)
