"""The check of each key by itself: whether `schema.py` has it, and whether its value has the type
and range given there.

pydantic finds the errors; the messages are worded here, from the JSON Schema of the sections.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.recipe.marks import KeyPath, Mark, Problem, dotted, first_mark, kind
from trainer.recipe.suggestions import meant_values
from trainer.recipe.unknown_keys import unknown_key
from trainer.recipe.wording import fits_type, schema_at, wanted
from trainer.redaction import shown
from trainer.schema import Recipe

MAX_EXPLAINED = 500  # problems: nobody reads more, and finding what was meant takes time


def validate(given: Mapping[str, Any], marks: Mapping[str, Mark]) -> tuple[Recipe, list[Problem], set[str]]:
    """Return the recipe without its faulty keys, the problems, and the dotted names of keys that
    must not be checked further."""
    value = copy.deepcopy(dict(given))
    problems: list[Problem] = []
    faulty: set[str] = set()
    while True:
        try:
            return Recipe.model_validate(value), problems, faulty
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path: KeyPath = tuple(detail["loc"])
                message, meant = (
                    _explain(detail, given) if len(problems) < MAX_EXPLAINED else (f"{dotted(path)}: {detail['msg']}", [])
                )
                places = [dotted(path[:length]) for length in range(len(path), 0, -1)]
                problems.append(Problem(first_mark(places, marks), message))
                faulty |= {dotted(path), *(key for key in meant if key not in marks)}
                _drop(value, path)


def _drop(value: Any, path: KeyPath) -> None:
    """Remove the faulty key, or the whole list that it is in."""
    index = next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))
    for part in path[: index - 1]:
        value = value.get(part, {})
    value.pop(path[index - 1], None)


def _explain(detail: ErrorDetails, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return one line for one error of pydantic, and the keys that were probably meant."""
    path: KeyPath = tuple(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(path, detail["input"], given)
    node = schema_at(path)
    if detail["type"] == "missing":
        return f"{dotted(path)} is missing: {node.get('description', '')}", []
    value = detail["input"]
    message = f"{dotted(path)} = {shown(value)}: must be {wanted(node)}"
    if not fits_type(value, node):
        message += f", not {kind(value)}"
    return message + _remedy(path, value, node), []


def _remedy(path: KeyPath, value: Any, node: Mapping[str, Any]) -> str:
    """Return what to write in place of a value, in words; "" where that is not known."""
    if value is None:
        return "" if node["required key"] else "; remove the key to get the default"
    found = meant_values(path, value, node)
    if not found:
        return ""
    better = found[0]
    if isinstance(value, str) and not isinstance(better, str | list | dict):
        return f"; write {json.dumps(better)} without quotes"
    if isinstance(value, str | bool) and isinstance(better, str):
        return f"; did you mean {' or '.join(map(json.dumps, found))}?"
    return f"; write {json.dumps(better)}"
