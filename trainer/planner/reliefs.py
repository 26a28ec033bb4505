"""The change of one key of a recipe that frees memory, and how much of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.memory import RankMemory, memory
from trainer.recipe.batch_plan import BatchPlan, divisors, layout_of
from trainer.recipe.marks import put
from trainer.recipe.network import fit_findings
from trainer.recipe.pipeline import check_micro_batches, pipeline_findings
from trainer.recipe.rules import section_findings
from trainer.schema import Recipe

HOW = "the plan"  # where the number of ranks is known from; nobody is shown it
# A milder value of a key is taken where it frees nearly as much as the strongest.
NEARLY = 0.9
# What is not worth a change: less than this share of the memory that is held.
LITTLE = 0.03

Held = Callable[[Sequence[RankMemory]], int]


class Relief(NamedTuple):
    """A setting, as --set takes it, and the bytes that it frees."""

    setting: str
    num_bytes: int


def reliefs(recipe: Recipe, network: TransformerConfig, world_size: int, held: Held, *, on_gpu: bool = True) -> list[Relief]:
    """Return the setting of each key that frees memory, the one that frees most first.

    `held`: the bytes that matter of the plan's ranks, such as those of the fullest one on its
    device.
    """
    before = held(_planned(recipe, network, world_size, on_gpu))
    found = []
    for key, values in _candidates(recipe):
        freed = []
        for value in values:
            changed = with_value(recipe, key, value)
            if is_legal(changed, network, world_size):
                setting = f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                freed.append(Relief(setting, before - held(_planned(changed, network, world_size, on_gpu))))
        most = max((relief.num_bytes for relief in freed), default=0)
        found += [relief for relief in freed if most > LITTLE * before and relief.num_bytes >= NEARLY * most][:1]
    return sorted(found, key=lambda relief: -relief.num_bytes)


def with_value(recipe: Recipe, key: str, value: Any) -> Recipe:
    """Return the recipe with one value by its dotted key."""
    values = recipe.model_dump()
    put(values, tuple(key.split(".")), value)
    return Recipe.model_validate(values)


def is_legal(recipe: Recipe, network: TransformerConfig, world_size: int) -> bool:
    """Return whether `check` passes a recipe of this network on so many ranks."""
    if [*section_findings(recipe, ()), *pipeline_findings(recipe), *fit_findings(recipe, network)]:
        return False
    try:
        check_micro_batches(recipe, BatchPlan.from_recipe(recipe, world_size, HOW))
    except RecipeError:
        return False
    return True


def _candidates(recipe: Recipe) -> Iterator[tuple[str, list[Any]]]:
    """Yield the keys that hold less memory with other values, and these values, the one that costs
    least time first."""
    recompute = ["none", "selective", "full"]
    yield "train.recompute", recompute[recompute.index(recipe.train.recompute) + 1 :]
    smaller = sorted(divisors(recipe.batch.micro_sequences))[:-1]
    yield "batch.micro_sequences", smaller[-1:]
    yield "zero.stage", list(range(recipe.zero.stage + 1, 4))
    if recipe.zero.offload_optimizer.device == "none":
        yield "zero.offload_optimizer.device", ["cpu"]
    if recipe.zero.offload_param.device == "none":
        yield "zero.offload_param.device", ["cpu"]
    yield "parallel.tensor", [2 * recipe.parallel.tensor]
    if recipe.checkpoint.asynchronous and recipe.checkpoint.every:
        yield "checkpoint.async", [False]


def _planned(recipe: Recipe, network: TransformerConfig, world_size: int, on_gpu: bool) -> list[RankMemory]:
    plan = BatchPlan.from_recipe(recipe, world_size, HOW)
    return memory(recipe, plan, network, layout_of(recipe.parallel, world_size, HOW), on_gpu=on_gpu)
