"""What would end a job at once, or let its nodes wait, looked for before it is in the queue. No torch.

The strict door has read the recipe by then, and has seen that the files which it names exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.batching import BatchPlan
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.room import bytes_of_one, room
from trainer.data import was_prepared
from trainer.deepspeed_config import deepspeed_config
from trainer.model.config import TransformerConfig, largest_weight
from trainer.model.costs import count_parameters
from trainer.recipe.pipeline import check_micro_batches
from trainer.run_folder import RunFolder
from trainer.sections import Recipe


def divide(recipe: Recipe, network: TransformerConfig | None, world_size: int, how: str) -> None:
    """RecipeError when `world_size` ranks, which come from `how`, cannot train the recipe."""
    plan = BatchPlan.from_recipe(recipe, world_size, how)
    check_micro_batches(recipe, plan)
    deepspeed_config(recipe, plan, largest_weight=largest_weight(network) if network is not None else None)


def remarks(recipe: Recipe, network: TransformerConfig | None, run_dir: Path) -> Iterator[str]:
    """What its owner may want to change before the recipe waits in a queue."""
    if not was_prepared(recipe.data, Path(str(recipe.data.cache_dir))):
        yield (
            "the data is not tokenized yet: one rank of the job will do it while the others wait; `triaxis data prepare` with "
            "the same recipe does it now"
        )
    if network is not None and recipe.tuning.method is None:  # what is trained beside a frozen model is known once it is built
        one = bytes_of_one(recipe, trained=count_parameters(network))
        line = room(recipe, CheckpointFolder(RunFolder(run_dir).checkpoints), one)
        if line.startswith("warning: ") or not recipe.checkpoint.every:
            yield line
