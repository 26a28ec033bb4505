"""The division of a recipe over a number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.model.config import TransformerConfig
    from trainer.recipe.batch_plan import BatchPlan
    from trainer.schema import Recipe


def divide(recipe: Recipe, network: TransformerConfig | None, world_size: int, how: str) -> tuple[BatchPlan, dict[str, Any]]:
    """Return the recipe's batch plan and DeepSpeed config; the one for devices with bf16, where
    these decide the compute format. RecipeError if `world_size` ranks, which come from `how`,
    cannot train it."""
    from trainer.engine.deepspeed_config import deepspeed_config
    from trainer.recipe.batch_plan import BatchPlan
    from trainer.recipe.pipeline import check_micro_batches

    if recipe.precision.dtype is None:
        recipe = recipe.with_format("bf16")
    plan = BatchPlan.from_recipe(recipe, world_size, how)
    check_micro_batches(recipe, plan)
    return plan, deepspeed_config(recipe, plan, largest_weight=network.largest_weight if network is not None else None)
