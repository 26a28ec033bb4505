"""What a task minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from trainer.model.heads import Loss, next_token_loss
from trainer.model.preference_losses import preference_loss
from trainer.schema import Recipe
from trainer.tasks import TASKS, TaskName


def loss_of(recipe: Recipe) -> Loss:
    """Return what the recipe's task minimises."""
    return LOSSES[recipe.data.task](recipe)


def _of_tokens(recipe: Recipe) -> Loss:
    return partial(next_token_loss, smoothing=recipe.train.label_smoothing)


def _of_pairs(recipe: Recipe) -> Loss:
    return partial(preference_loss, keys=recipe.preference)


LOSSES: Mapping[TaskName, Callable[[Recipe], Loss]] = {
    **dict.fromkeys(TASKS, _of_tokens),
    "preference": _of_pairs,
}
