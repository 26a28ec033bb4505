"""The JSON Schema of a recipe, and the words for what each key takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from trainer.recipe.marks import KeyPath
from trainer.schema import Recipe


@cache
def _schema() -> dict[str, Any]:
    schema = Recipe.model_json_schema()
    extends = {"type": "string", "description": "A recipe that this one changes; relative to this file."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors: the sections and `extends`."""
    return copy.deepcopy(_schema())


def schema_at(path: KeyPath) -> dict[str, Any]:
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


def choices_of(node: Mapping[str, Any]) -> list[Any]:
    """Return the values of a key that takes only some, else none."""
    return [node["const"]] if "const" in node else list(node.get("enum", ()))


def wanted(node: Mapping[str, Any]) -> str:
    """Return the legal values of a key in words, as they follow "must be"."""
    if choices := choices_of(node):
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


def fits_type(value: Any, node: Mapping[str, Any]) -> bool:
    """Return whether a value has the type of a key, whatever its range."""
    types: dict[str, tuple[type, ...]] = {
        "integer": (int,),
        "number": (int, float),
        "string": (str,),
        "boolean": (bool,),
        "array": (list,),
    }
    wanted = types.get(node.get("type", ""), (dict,))
    return isinstance(value, wanted) and (not isinstance(value, bool) or wanted == (bool,))
