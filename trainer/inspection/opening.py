"""The way from a recipe to what its run will see: the same preparation, order and targets."""

from __future__ import annotations

from pathlib import Path

from trainer.data import PreparedData, prepare
from trainer.data.cache import Progress
from trainer.engine.first_weights import first_weights
from trainer.inspection.sequences import Inspection
from trainer.recipe import ResolvedRecipe
from trainer.recipe.earlier import as_begun, rules_of_run
from trainer.run.step_data import evaluation_data, training_data
from trainer.run_folder import RunFolder
from trainer.tasks import TASKS


def inspection_of(resolved: ResolvedRecipe, progress: Progress) -> tuple[Inspection, list[str]]:
    """Prepare the data of a recipe, or find it prepared, and return it with remarks.

    A run that is in the recipe's run folder already keeps the rules of the data by which it began.
    RecipeError or DataError as at the start of a run.
    """
    resolved, remarks = _as_run(resolved)
    recipe = resolved.recipe
    cache_dir = Path(str(recipe.data.cache_dir))
    prepared = prepare(recipe.data, seed=recipe.run.seed, cache_dir=cache_dir, build=True, progress=progress)
    causal = _is_causal(resolved, prepared)
    training = training_data(recipe, prepared, causal=causal)
    evaluation = evaluation_data(recipe, prepared, causal=causal)
    return Inspection(recipe, prepared, training, evaluation), [*remarks, *prepared.notes]


def _as_run(resolved: ResolvedRecipe) -> tuple[ResolvedRecipe, list[str]]:
    folder = RunFolder.of(resolved.recipe, None)
    rules = rules_of_run(folder.resolved) if folder.holds_a_run else None
    return (resolved, []) if rules is None else as_begun(resolved, rules, f"the run in {folder.path}")


def _is_causal(resolved: ResolvedRecipe, prepared: PreparedData) -> bool:
    """Return whether tokens of the run's network see only those before them, where the targets
    depend on it."""
    if TASKS[resolved.recipe.data.task].target != "label":
        return True
    network, _ = first_weights(resolved, prepared.tokenizer, prepared.classes, resumed=True)
    return network.causal
