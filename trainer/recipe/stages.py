"""The division of the network's blocks over the stages of the pipeline."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

from parallel.balance import balance
from trainer.costs.blocks import block_costs
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.recipe.pipeline import rank_of_stage
from trainer.schema import Recipe


def stages_of(recipe: Recipe, network: TransformerConfig) -> list[list[Block]]:
    """Return the blocks of each stage in the order of the model, for a valid recipe.

    The embedding goes with the first layer and the head with the last: a stage without a layer
    would pass on nothing.
    """
    embedding, *layers, head = blocks_of(network)
    cuts = accumulate(recipe.parallel.balance or layers_by_cost(recipe, network), initial=0)
    stages = [layers[first:end] for first, end in pairwise(cuts)]
    stages[0].insert(0, embedding)
    stages[-1].append(head)
    return stages


def layers_by_cost(recipe: Recipe, network: TransformerConfig) -> list[int]:
    """Return the number of layers on each stage, so that no rank has much more to do than the
    others."""
    return [*_divided(tuple(cost_of_blocks(recipe, network)), tuple(rank_of_stage(recipe.parallel)))]


# A plan asks for a division several times, a search for each of many.
@lru_cache(maxsize=1024)
def _divided(costs: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    embedding, *layers, head = costs
    layers[0] += embedding
    layers[-1] += head
    return tuple(len(part) for part in balance(layers, ranks))


def cost_of_blocks(recipe: Recipe, network: TransformerConfig) -> list[int]:
    return block_costs(network, seq_len=recipe.data.seq_len, micro_sequences=recipe.batch.micro_sequences)
