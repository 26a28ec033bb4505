"""The rules of the data that have changed: a run keeps those it began with, and a checkpoint those
it was trained with.

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
from trainer.redaction import shown
from trainer.run_folder import read_resolved
from trainer.schema import Recipe

ORIGIN = "earlier version"
# The behaviour before there was the key.
EARLIER = {"data.tails": "drop", "data.bos": False, "data.hold_out_tail": False}
# A run also keeps the weights if its recipe leaves them open: the default was 1 for each source
# before.
KEPT = (*EARLIER, "data.sources[].weight")
UNWRITTEN = ("default", ORIGIN)


def rules_of_run(resolved_json: Path) -> dict[str, Any] | None:
    """Return the rules by which the run with that resolved.json began, as far as its recipe left
    them open, by dotted key.

    None if the file is missing or damaged.
    """
    try:
        values = read_resolved(resolved_json)["values"]
    except (RecipeError, DataError):
        return None
    open_ones = {key: entry["value"] for key, entry in values.items() if _is_kept(key) and entry["origin"] in UNWRITTEN}
    return open_ones | _lacking(values)


def rules_of_checkpoint(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rules by which the data of a checkpoint were laid out. `recipe`: that of its
    manifest."""
    values = {dotted(path): value for path, value in leaves(recipe)}
    return {key: value for key, value in values.items() if _is_kept(key)} | _lacking(values)


def as_begun(resolved: ResolvedRecipe, rules: Mapping[str, Any], where: str) -> tuple[ResolvedRecipe, list[str]]:
    """Return the recipe with the rules of what it goes on from, if it leaves them open, and
    remarks. `where`: the name of that."""
    values = resolved.recipe.model_dump()
    changed = {
        path: rules[key]
        for path, value in leaves(values)
        if (key := dotted(path)) in rules and resolved.origins[key] == "default" and rules[key] != value
    }
    if not changed:
        return resolved, []
    for path, value in changed.items():
        put(values, path, value)
    recipe = _valid(values, where)
    origins = resolved.origins | {dotted(path): ORIGIN for path in changed}
    said = {pattern(dotted(path)): json.dumps(value) for path, value in changed.items()}
    kept = ", ".join(f"{key} = {value}" for key, value in said.items())
    return replace(resolved, recipe=recipe, origins=origins), [
        f"{where} keeps the rules of the data that it began with: {kept}"
    ]


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
    data |= {key.removeprefix("data."): value for key, value in lacking.items()}
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
