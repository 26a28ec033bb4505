"""The defaults of a recipe that goes on from a pretrained model: those of its task and method,
where it leaves a key open."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trainer.fine_tuning import Rates, rates_of
from trainer.recipe.marks import KeyPath, put
from trainer.schema import Optimizer, Recipe, Schedule
from trainer.update_rules import rule_of

ORIGIN = "task default"
FORMAT = "precision.dtype"
WARMUP = ("schedule.warmup_steps", "schedule.warmup_ratio")


def with_task_defaults(recipe: Recipe, written: Collection[str]) -> tuple[Recipe, set[KeyPath]]:
    """Return the recipe with the defaults of its task and method, and the paths of their keys. The
    compute format stays open (None), because the devices of the first start decide it.

    `written` holds the dotted keys that the recipe gives. A format that it gives as null is open.
    """
    if recipe.model.from_pretrained is None:
        return recipe if recipe.precision.dtype is not None else recipe.with_format("fp32"), set()
    rates = rates_of(recipe.data.task, recipe.preference.loss, recipe.tuning.method)
    defaults: dict[KeyPath, Any] = {("optimizer", key): value for key, value in _of_optimizer(rates, recipe.optimizer)}
    defaults |= {("schedule", key): value for key, value in _of_schedule(rates, recipe.schedule, written)}
    defaults = {path: value for path, value in defaults.items() if ".".join(map(str, path)) not in written}
    if FORMAT not in written or recipe.precision.dtype is None:
        defaults["precision", "dtype"] = None
    values = recipe.model_dump()
    for path, value in defaults.items():
        put(values, path, value)
    return Recipe.model_validate(values), set(defaults)


def _of_optimizer(rates: Rates, optimizer: Optimizer) -> Iterator[tuple[str, float]]:
    """Yield keys of the section with their values. Where the rule's rate is another than AdamW's,
    rate × decay stays the same; where it cannot be told from AdamW's, it is left out."""
    beside = rule_of(optimizer).lr_beside_adamw
    if beside is not None:
        yield "lr", float(f"{rates.lr * beside:.3g}")
    yield "weight_decay", float(f"{rates.weight_decay / (beside or 1.0):.3g}")


def _of_schedule(rates: Rates, schedule: Schedule, written: Collection[str]) -> Iterator[tuple[str, Any]]:
    shape = schedule.name if "schedule.name" in written else rates.schedule
    yield "name", rates.schedule
    if shape == rates.schedule:  # another shape has its own end
        yield "min_lr_ratio", 0.0
    if not any(key in written for key in WARMUP):
        yield "warmup_ratio", rates.warmup
