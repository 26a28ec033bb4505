"""The checks, before a job is queued, for what would keep its nodes waiting or lose work. No
torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.checkpoint.disk_space import bytes_of_one, disk_space
from trainer.checkpoint.folder import CheckpointFolder
from trainer.costs.blocks import count_parameters
from trainer.data import was_prepared
from trainer.model.config import TransformerConfig
from trainer.run_folder import RunFolder
from trainer.schema import Recipe


def remarks(recipe: Recipe, network: TransformerConfig | None, run_dir: Path) -> Iterator[str]:
    """Yield what the owner may want to change before the recipe waits in a queue."""
    if not was_prepared(recipe.data, Path(str(recipe.data.cache_dir))):
        yield (
            "the data is not tokenized yet: one rank of the job will do it while the others wait; `triaxis data prepare` with "
            "the same recipe does it now"
        )
    # What is trained beside a frozen model is known only once it is built.
    if network is not None and recipe.tuning.method is None:
        one = bytes_of_one(recipe, trained=count_parameters(network))
        found = disk_space(recipe, CheckpointFolder(RunFolder(run_dir).checkpoints), one)
        if not found.enough:
            yield found.line
