"""The check of each key by itself: whether `schema.py` has it, and whether its value has the type
and range given there.

pydantic finds the errors; the messages are worded here, from the JSON Schema of the sections.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.recipe.json_reader import JSONSyntaxError, Reader
from trainer.recipe.marks import KeyPath, Mark, Problem, dotted, first_mark, kind
from trainer.recipe.unknown_keys import unknown_key
from trainer.redaction import shown
from trainer.schema import Recipe
from trainer.spelling import nearest

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
                message, meant = _explain(detail) if len(problems) < MAX_EXPLAINED else (f"{dotted(path)}: {detail['msg']}", [])
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


def _explain(detail: ErrorDetails) -> tuple[str, list[str]]:
    """Return one line for one error of pydantic, and the keys that were probably meant."""
    path: KeyPath = tuple(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(path)
    node = _schema_at(path)
    if detail["type"] == "missing":
        return f"{dotted(path)} is missing: {node.get('description', '')}", []
    value = detail["input"]
    message = f"{dotted(path)} = {shown(value)}: must be {_wanted(node)}"
    if not _fits_type(value, node):
        message += f", not {kind(value)}"
    return message + _remedy(value, node), []


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors: the sections and `extends`."""
    schema = copy.deepcopy(_schema())
    extends = {"type": "string", "description": "A recipe that this one changes; relative to this file."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _schema_at(path: KeyPath) -> dict[str, Any]:
    """Return the JSON Schema of one key, from which messages about it are worded."""
    node = _schema()
    for part in path:
        inherited = {"required key": part in node.get("required", ())}
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        inherited["description"] = node.get("description", "")
        node = next((n for n in node.get("anyOf", ()) if n.get("type") != "null"), node)
        if "$ref" in node:
            node = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
        node = {**node, **inherited}
    return node


def _choices(node: Mapping[str, Any]) -> list[Any]:
    return [node["const"]] if "const" in node else list(node.get("enum", ()))


def _wanted(node: Mapping[str, Any]) -> str:
    if choices := _choices(node):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(json.dumps, choices))
    match node.get("type"):
        case "integer" | "number":
            return ("a whole number" if node["type"] == "integer" else "a number") + _range(node)
        case "string":
            if "pattern" in node:
                return f"a string that matches {node['pattern']}"
            return "a string that is not empty" if node.get("minLength") else "a string"
        case "boolean":
            return "true or false"
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems")
            if most is not None:
                return f"a list of {least}" if least == most else f"a list of {least} to {most}"
            return f"a list of at least {least}" if least else "a list"
        case _:
            return "an object"


def _range(node: Mapping[str, Any]) -> str:
    bounds = []
    for name, word in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if name in node:
            bounds.append(f"{word} {node[name]:{'d' if isinstance(node[name], int) else '.15g'}}")
    if "multipleOf" in node:
        bounds.append(f"a multiple of {node['multipleOf']}")
    return " " + " and ".join(bounds) if bounds else ""


def _fits_type(value: Any, node: Mapping[str, Any]) -> bool:
    types: dict[str, tuple[type, ...]] = {
        "integer": (int,),
        "number": (int, float),
        "string": (str,),
        "boolean": (bool,),
        "array": (list,),
    }
    wanted = types.get(node.get("type", ""), (dict,))
    return isinstance(value, wanted) and (not isinstance(value, bool) or wanted == (bool,))


def _remedy(value: Any, node: Mapping[str, Any]) -> str:
    wanted = node.get("type")
    if value is None:
        return "" if node["required key"] else "; remove the key to get the default"
    if isinstance(value, str) and wanted in ("integer", "number", "boolean"):
        text = value.strip().lower() if wanted == "boolean" else value.strip()
        try:
            meant = Reader(text).document()
        except JSONSyntaxError:
            return ""
        return f"; write {text} without quotes" if _fits_type(meant, node) else ""
    if isinstance(value, float) and wanted == "integer" and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, int | float) and wanted == "string":
        return f'; write "{json.dumps(value)}"'
    choices = [choice for choice in _choices(node) if isinstance(choice, str)]
    if isinstance(value, str) and (meant_choice := nearest(value, choices)):
        return f"; did you mean {json.dumps(meant_choice)}?"
    if wanted == "array" and not isinstance(value, list | dict):
        return f"; write [{json.dumps(value)}]"
    return ""
