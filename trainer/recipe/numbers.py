"""The numbers of a recipe that are used in fp32: one that would become 0, 1 or infinite there is
refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from trainer.model.single_precision import LARGEST, SMALLEST, in_range, rounded
from trainer.schema import Finding, Recipe

# The keys whose number a device computes with. The numbers of other keys are used here, in double
# precision.
KEYS = (
    *("optimizer.lr", "optimizer.eps", "optimizer.betas", "optimizer.momentum", "optimizer.weight_decay"),
    *("train.clip_norm", "train.label_smoothing", "precision.loss_scale.static"),
    *("tuning.alpha", "tuning.dropout", "tuning.budget.betas", "tuning.budget.orthogonality"),
    *("preference.beta", "preference.label_smoothing"),
)


def number_findings(recipe: Recipe) -> Iterator[Finding]:
    for key in KEYS:
        value: Any = reduce(getattr, key.split("."), recipe)
        for place, number in (
            [(f"{key}[{n}]", one) for n, one in enumerate(value)] if isinstance(value, list) else [(key, value)]
        ):
            if number and (told := _told(number)):
                yield Finding((place, key), f"{place} = {number:.15g} {told}")


def _told(number: float) -> str:
    if not in_range(number):
        becomes = "0" if number < SMALLEST else "infinite"
        return f"is {becomes} in fp32, in which it is used; legal: {SMALLEST:.3g} to {LARGEST:.3g}"
    if number < 1.0 <= rounded(number):
        return f"is 1 in fp32, in which it is used; legal: up to {1 - 2.0**-24:.8f}"
    return ""
