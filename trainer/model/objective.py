"""The objectives that tasks minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainer.model.heads import Classes, NextToken, Objective
from trainer.model.preference_losses import Pairs
from trainer.schema import Recipe
from trainer.tasks import TaskName


def objective_of(recipe: Recipe) -> Objective:
    """Return the objective of the recipe's task."""
    return OBJECTIVES[recipe.data.task](recipe)


def _of_tokens(recipe: Recipe) -> Objective:
    return Objective(of_tokens=NextToken(recipe.train.label_smoothing))


def _of_pairs(recipe: Recipe) -> Objective:
    return Objective(of_tokens=Pairs(recipe.preference))


OBJECTIVES: Mapping[TaskName, Callable[[Recipe], Objective]] = {
    **dict.fromkeys(("pretrain", "sft", "translate", "mlm"), _of_tokens),
    "preference": _of_pairs,
    "classify": lambda _: Objective(of_labels=Classes()),
}
