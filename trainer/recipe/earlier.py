"""The rules that a run keeps where its recipe leaves them open: those of the data that have
changed, and the defaults of its task and method. A checkpoint has those it was trained with.

Each is a key of the recipe, so the rule of a run is in its resolved.json and in its checkpoints'
manifests. Files of a version that did not have the key lack it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import DataError, RecipeError
from trainer.recipe.marks import dotted, leaves, pattern, put
from trainer.recipe.resolve import ResolvedRecipe
from trainer.recipe.task_defaults import FORMAT, WARMUP
from trainer.recipe.task_defaults import ORIGIN as TASK_DEFAULT
from trainer.redaction import shown
from trainer.run_folder import Entry, read_resolved
from trainer.schema import Recipe

ORIGIN = "earlier version"
# The behaviour before there was the key.
EARLIER = {
    "data.tails": "drop",
    "data.bos": False,
    "data.hold_out_tail": False,
    "schedule.warmup_ratio": None,
}
# What the optimizer does with its rates depends on its name.
OF_THE_OPTIMIZER = ("optimizer.lr", "optimizer.weight_decay")
OPTIMIZER = "optimizer.name"
# A run also keeps the weights of its sources (the default was 1 for each before), the rates of its
# task, which a later version may have from a better source, and the format that its first devices
# decided.
KEPT = (
    *("data.tails", "data.bos", "data.hold_out_tail", "data.sources[].weight"),
    *OF_THE_OPTIMIZER,
    *("schedule.name", "schedule.min_lr_ratio", *WARMUP, FORMAT),
)
OPEN = ("default", TASK_DEFAULT)
UNWRITTEN = (*OPEN, ORIGIN)

Rules = dict[str, Entry]


def rules_of_run(resolved_json: Path) -> Rules | None:
    """Return the rules by which the run with that resolved.json began, as far as its recipe left
    them open, by dotted key; and its optimizer.

    None if the file is missing or damaged.
    """
    try:
        values = read_resolved(resolved_json)["values"]
    except (RecipeError, DataError):
        return None
    open_ones = {key: entry for key, entry in values.items() if _is_kept(key) and entry["origin"] in UNWRITTEN}
    optimizer = {OPTIMIZER: values[OPTIMIZER]} if OPTIMIZER in values else {}
    return {**open_ones, **optimizer, **_as_earlier(_lacking(values))}


def rules_of_checkpoint(recipe: Mapping[str, Any]) -> Rules:
    """Return the rules by which a checkpoint was trained. `recipe`: that of its manifest."""
    values = {dotted(path): value for path, value in leaves(recipe)}
    known = {key: value for key, value in values.items() if _is_kept(key) or key == OPTIMIZER}
    return _as_earlier(known | _lacking(values))


def as_begun(resolved: ResolvedRecipe, rules: Rules, where: str) -> tuple[ResolvedRecipe, list[str]]:
    """Return the recipe with the rules of what it goes on from, if it leaves them open, and
    remarks. `where`: the name of that."""
    values = resolved.recipe.model_dump()
    changed = {
        path: rules[key]
        for path, value in leaves(values)
        if (key := dotted(path)) in rules and _keeps(key, rules, resolved) and rules[key]["value"] != value
    }
    if not changed:
        return resolved, []
    for path, entry in changed.items():
        put(values, path, entry["value"])
    origins = {dotted(path): ORIGIN for path in changed}
    if resolved.recipe.precision.dtype is None and FORMAT in rules and rules[FORMAT]["origin"] == TASK_DEFAULT:
        origins[FORMAT] = TASK_DEFAULT  # it was open until this run's first start
    begun = replace(resolved, recipe=_valid(values, where), origins=resolved.origins | origins)
    said = {
        pattern(key): json.dumps(entry["value"]) for path, entry in changed.items() if origins[key := dotted(path)] == ORIGIN
    }
    kept = ", ".join(f"{key} = {value}" for key, value in said.items())
    return begun, [f"{where} keeps the rules that it began with: {kept}"] if kept else []


def _keeps(key: str, rules: Rules, resolved: ResolvedRecipe) -> bool:
    """Return whether today's recipe leaves the key open, and nothing that decides with it is
    written otherwise."""
    together = WARMUP if key in WARMUP else (key,)
    if not _is_kept(key) or any(resolved.origins[one] not in OPEN for one in together):
        return False
    same_optimizer = OPTIMIZER not in rules or rules[OPTIMIZER]["value"] == resolved.recipe.optimizer.name
    return same_optimizer or key not in OF_THE_OPTIMIZER


def _as_earlier(values: Mapping[str, Any]) -> Rules:
    return {key: {"value": value, "origin": ORIGIN} for key, value in values.items()}


def in_todays_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a manifest with the keys that did not exist when it was saved, and
    without one that is gone.

    The key that is gone could only have its default.
    """
    found = copy.deepcopy(dict(recipe))
    found.get("zero", {}).get("offload_optimizer", {}).pop("ratio", None)
    data = found.get("data", {})
    lacking = _lacking({dotted(path): value for path, value in leaves(recipe)})
    if "data.tails" in lacking:
        for source in (*data.get("sources", ()), *data.get("eval_sources", ())):
            if source.get("field") == "text":  # the default then, whether or not a file has fields
                source["field"] = None
    for key, value in lacking.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def recipe_of(checkpoint: Path, recipe: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint's manifest, in today's keys. DataError if it is not a
    recipe."""
    try:
        return _valid(in_todays_keys(recipe), f"{checkpoint / 'manifest.json'}")
    except (AttributeError, TypeError):  # a section that is no object
        raise DataError(f"{checkpoint / 'manifest.json'}: damaged: its recipe is not valid") from None


def _valid(values: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        value = shown(detail["input"])
        raise DataError(f"{where}: damaged: {dotted(tuple(detail['loc']))} = {value}: {detail['msg']}") from None


def _lacking(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in EARLIER.items() if key not in values}


def _is_kept(key: str) -> bool:
    return pattern(key) in KEPT
