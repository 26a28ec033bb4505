"""What a task minimises."""

from __future__ import annotations

from functools import partial

from trainer.model.heads import Loss, next_token_loss
from trainer.model.preference_losses import preference_loss
from trainer.schema import Recipe


def loss_of(recipe: Recipe) -> Loss:
    if recipe.data.task == "preference":
        return partial(preference_loss, keys=recipe.preference)
    return partial(next_token_loss, smoothing=recipe.train.label_smoothing)
