"""The steps of train.epochs, once the number of training sequences is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.errors import RecipeError
from trainer.learning_rate import decay_steps, schedule_findings
from trainer.passes import Passes, kept
from trainer.recipe.resolve import ResolvedRecipe
from trainer.recipe.tuning import tuning_findings
from trainer.schema import MOST_STEPS, Section


def settled(resolved: ResolvedRecipe, passes: Passes) -> ResolvedRecipe:
    """Return the recipe with the steps that its epochs are. RecipeError if the rest of it needs
    others."""
    recipe, epochs = resolved.recipe, resolved.recipe.train.epochs
    if epochs is None:
        return resolved
    steps = passes.steps(epochs, recipe.batch.global_sequences)
    where = f"train.epochs {epochs:g} over {passes.sequences:,} sequences is {steps:,} steps"
    if steps > MOST_STEPS:
        raise RecipeError(f"{where}: legal: up to {MOST_STEPS} steps; lower train.epochs")
    changed: dict[str, Section] = {"train": recipe.train.model_copy(update={"steps": steps})}
    origins = resolved.origins | {"train.steps": "derived"}
    if recipe.schedule.name == "wsd" and resolved.origins["schedule.decay_steps"] in ("default", "derived"):
        length = decay_steps(recipe.schedule.model_copy(update={"decay_steps": None}), steps)
        changed["schedule"] = recipe.schedule.model_copy(update={"decay_steps": length})
        origins["schedule.decay_steps"] = "derived"
    recipe = recipe.model_copy(update=changed)
    if findings := [*schedule_findings(recipe.schedule, recipe.train), *tuning_findings(recipe)]:
        raise RecipeError([f"{where}: {finding.message}" for finding in findings])
    return replace(resolved, recipe=recipe, origins=origins)


def as_tokenized(resolved: ResolvedRecipe) -> tuple[ResolvedRecipe, Passes | None]:
    """Return the recipe, settled if its data is tokenized in the cache, and its passes; None if it
    is not. Nothing of the data is read. RecipeError as of `settled`."""
    data = resolved.recipe.data
    passes = kept(Path(str(data.cache_dir)), data)
    return (resolved, None) if passes is None else (settled(resolved, passes), passes)
