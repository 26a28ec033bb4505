"""The memory of every rank of a run, from its recipe alone: what is held, where, and when. No
torch.

Ranks that differ only in their places among tensor or data-parallel ranks hold as much, so there is
one plan for each rank of the pipeline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from parallel.topology import Layout
from trainer.engine.tiling import Tiling
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.planner.activations import Rows, Saving
from trainer.planner.states import ITEMSIZE, ModelStates
from trainer.planner.weights import FP32_BYTES, RankWeights
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import rank_of_stage
from trainer.recipe.stages import stages_of
from trainer.schema import Recipe

Stages = Mapping[int, Sequence[Block]]  # the blocks of a rank's stages, by the numbers of these


def stages_of_ranks(recipe: Recipe, network: TransformerConfig) -> list[Stages]:
    """Return the stages of each rank of the pipeline."""
    if recipe.parallel.pipeline == 1:
        return [{0: blocks_of(network)}]
    ranks: defaultdict[int, dict[int, Sequence[Block]]] = defaultdict(dict)
    for stage, (blocks, rank) in enumerate(zip(stages_of(recipe, network), rank_of_stage(recipe.parallel), strict=True)):
        ranks[rank][stage] = blocks
    return [ranks[rank] for rank in range(recipe.parallel.pipeline)]


def model_states(
    recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout, *, data_rank: int = 0
) -> list[ModelStates]:
    """Return the model states of each rank of the pipeline."""
    weights = RankWeights(network=network, tensor=layout.tp, tuning=recipe.tuning)
    alone = Tiling.of(recipe)
    states = [
        ModelStates(
            recipe=recipe,
            weights=weights.of_stages(stages),
            data=layout.dp * layout.cp,
            data_rank=data_rank,
            tiling=alone,
            accumulates=plan.num_micro_batches > 1,
        )
        for stages in stages_of_ranks(recipe, network)
    ]
    together = alone.together([state.num_groups for state in states], [len(state.trained) for state in states])
    return [state.cut(together) for state in states]


def saving(recipe: Recipe, network: TransformerConfig, layout: Layout, rows: Rows) -> Saving:
    """Return how a rank computes micro-batches of such rows."""
    itemsize = ITEMSIZE[recipe.precision.settled]
    tuned = recipe.tuning.method is not None
    return Saving(
        network=network,
        rows=rows,
        tensor=layout.tp,
        divides_tokens=recipe.parallel.divides_tokens,
        itemsize=itemsize,
        recompute=recipe.train.recompute,
        casts=recipe.zero.stage == 0 and itemsize < FP32_BYTES and not tuned,
        trains_model=not tuned,
        adapted=recipe.tuning.rank if tuned else 0,
    )
