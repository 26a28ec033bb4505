"""The tables of relative positions: one for all layers that read a source, one for all that write
its target.

Where these layers are on several stages of a pipeline, each rank that has some of them has a copy
of the table, as the first and the last stage have copies of a tied embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from parallel.mesh import Group, Mesh
from parallel.params import Init
from parallel.relative_bias import RelativeBias
from parallel.tensor import TensorParallel
from parallel.ties import part_of_pipeline
from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.model.names import position_table


class PositionTables:
    """The tables of this rank: the first layer that needs one makes it, the others use the same.

    `tied_over`: for tables that several stages use, the ranks of these stages.
    """

    def __init__(self, tied_over: Mapping[str, Group] = MappingProxyType({})) -> None:
        self._tied_over = tied_over
        self._made: dict[str, RelativeBias] = {}

    def of_layer(self, config: TransformerConfig, layer: int, init: Init, tp: TensorParallel) -> RelativeBias | None:
        name = position_table(config, layer)
        if name is None:
            return None
        bias = RelativeBias(
            num_heads=config.num_heads,
            buckets=config.relative_buckets,
            furthest=config.relative_distance,
            causal=config.causal and layer >= config.encoder_layers,
            name=name,
            init=init,
            tp=tp,
            tied_to=self._made.get(name),
            tied_over=self._tied_over.get(name),
        )
        self._made.setdefault(name, bias)
        return bias


def ranks_of_tables(
    config: TransformerConfig, stages: Sequence[Sequence[Block]], rank_of_stage: Mapping[int, int], mesh: Mesh
) -> dict[str, Group]:
    """Return, for each table that several stages use and this rank has, the ranks that have it. All
    ranks must call it together."""
    users: dict[str, list[int]] = defaultdict(list)
    for stage, blocks in enumerate(stages):
        layers = (block.layer for block in blocks if block.kind == "layer")
        for name in dict.fromkeys(position_table(config, layer) for layer in layers):
            if name is not None:
                users[name].append(stage)
    over = {}
    for name, using in users.items():
        holders = part_of_pipeline(mesh, sorted({rank_of_stage[stage] for stage in using})) if len(using) > 1 else None
        if holders is not None:
            over[name] = holders
    return over
