"""The checks, before a job is queued, for what would keep its nodes waiting or lose work. No
torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.checkpoint.disk_space import bytes_of_one, disk_space
from trainer.checkpoint.folder import CheckpointFolder
from trainer.costs.blocks import count_parameters
from trainer.data import was_prepared
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.explain import seconds
from trainer.planner.prediction import Prediction, predict
from trainer.planner.search.choice import as_words
from trainer.planner.search.find import Search
from trainer.planner.verdict import require_fit, verdict
from trainer.recipe import ResolvedRecipe
from trainer.run_folder import RunFolder
from trainer.schema import Recipe

BEATEN = 1.2  # times the best layout's step, from where on an owner is told of the best


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


def of_plan(
    resolved: ResolvedRecipe,
    network: TransformerConfig,
    world_size: int,
    device: Device,
    *,
    refuses: bool,
    compares: bool,
) -> Iterator[str]:
    """Yield what the plan for the site's device says against a recipe, and, if it `compares`, which
    layout is much faster. RecipeError if it does not fit and the check `refuses` that."""
    prediction = predict(resolved.recipe, network, world_size, device, "--nodes × --ranks-per-node")
    if prediction.fits is False and not refuses:
        yield f"warning: {verdict(prediction)}"
        return
    try:
        require_fit(resolved, network, prediction)
    except RecipeError as refused:
        raise RecipeError([*refused.lines, "--no-plan-check submits it all the same"]) from None
    if compares:
        yield from _beaten(Search(resolved, network, world_size, device), prediction)


def _beaten(search: Search, prediction: Prediction) -> Iterator[str]:
    best, time = search.best, prediction.time
    if best is not None and time is not None and time.total > BEATEN * best.seconds:
        settings = as_words(best.choice.settings(search.resolved))
        yield (
            f"warning: another layout is {time.total / best.seconds - 1:.0%} faster by the plan, {seconds(best.seconds)} for a "
            f"step instead of {seconds(time.total)}: {settings}"
        )
