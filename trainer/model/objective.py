"""The objectives that tasks minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainer.model.heads import NextToken, Objective
from trainer.model.preference_losses import Pairs
from trainer.schema import Recipe
from trainer.tasks import TASKS, TaskName


def objective_of(recipe: Recipe) -> Objective:
    """Return the objective of the recipe's task."""
    return OBJECTIVES[recipe.data.task](recipe)


def _of_tokens(recipe: Recipe) -> Objective:
    return NextToken(recipe.train.label_smoothing)


def _of_pairs(recipe: Recipe) -> Objective:
    return Pairs(recipe.preference)


OBJECTIVES: Mapping[TaskName, Callable[[Recipe], Objective]] = {
    **dict.fromkeys(TASKS, _of_tokens),
    "preference": _of_pairs,
}
