"""The keys and values that a message suggests in place of refused ones: only such as are taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from trainer.convert.schema_keys import conditions_of, fields_of, is_one_of
from trainer.convert.words import other_values
from trainer.recipe.json_reader import JSONSyntaxError, Reader
from trainer.recipe.marks import KeyPath, dotted
from trainer.recipe.wording import choices_of, fits_type, schema_at, wanted
from trainer.schema import Recipe
from trainer.spelling import nearest


def accepted(path: KeyPath, value: Any) -> bool:
    """Return whether a key takes a value, whatever else is in the recipe."""
    if path == ("extends",):  # a key of files, which no section has
        return isinstance(value, str)
    recipe: Any = value
    for part in reversed(path):
        recipe = [*[{}] * part, recipe] if isinstance(part, int) else {part: recipe}
    try:
        Recipe.model_validate(recipe)
    except ValidationError as error:
        return not any(detail["loc"][: len(path)] == path for detail in error.errors(include_url=False))
    return True


def meant_values(path: KeyPath, value: Any, node: Mapping[str, Any]) -> list[Any]:
    """Return the values that were probably meant by one that a key does not take, the likeliest
    first; [] if none is known."""
    for candidates in _candidates(path, value, node):
        told = {json.dumps(one): one for one in candidates if one is not None}
        if taken := [one for one in told.values() if accepted(path, one)]:
            return taken
    return []


def _candidates(path: KeyPath, value: Any, node: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield values that may have been meant, those that are equally likely together."""
    key, kind = re.sub(r"\[\d+\]", "", dotted(path)), node.get("type")
    if isinstance(value, str):
        yield [_unquoted(value, node)]
    elif isinstance(value, float) and value.is_integer():
        yield [int(value)]
    theirs = [*other_values(key, value)]
    in_list = isinstance(path[-1], int)
    yield [one for found in theirs for one in (found if isinstance(found, list) and in_list else [found])]
    if isinstance(value, str):
        yield [nearest(value, [choice for choice in choices_of(node) if isinstance(choice, str)])]
    if isinstance(value, int | float) and not isinstance(value, bool) and kind == "string":
        yield [json.dumps(value)]
    if kind == "array" and not isinstance(value, list):
        items = schema_at((*path, 0))
        yield [[value], [_in_object(value, items)]]
    yield [_in_object(value, node)]


def _unquoted(value: str, node: Mapping[str, Any]) -> Any:
    """Return the number or boolean that a text spells."""
    text = value.strip().lower() if node.get("type") == "boolean" else value.strip()
    try:
        meant = Reader(text).document()
    except JSONSyntaxError:
        return None
    return meant if fits_type(meant, node) and not isinstance(meant, str) else None


def _in_object(value: Any, node: Mapping[str, Any]) -> Any:
    """Return an object with the value under the one key that must be there, or that has it as a
    choice."""
    required = node.get("required", ())
    if isinstance(value, str) and len(required) == 1:
        return {required[0]: value}
    for name, inner in node.get("properties", {}).items():
        for choice in (inner, *inner.get("anyOf", ())):
            if isinstance(value, str) and value in choice.get("enum", ()):
                return {name: value}
    return None


Given = Mapping[str, Any]


def offer(path: KeyPath, value: Any, given: Given, *, with_value: bool = False, beside: Given = MappingProxyType({})) -> str:
    """Return a key as a message suggests it for a value that was given elsewhere.

    Its own value follows where it takes another one (or `with_value`), its legal values where none
    is known, and the value of another key with which alone it is used. `beside`: dotted keys that
    are suggested with it, and their values.
    """
    key = dotted(path)
    if accepted(path, value):
        told, taken = f" = {json.dumps(value)}" if with_value else "", value
    elif better := meant_values(path, value, schema_at(path)):
        told, taken = f" = {json.dumps(better[0])}", better[0]
    else:
        told, taken = f", {wanted(schema_at(path))}", value
    needed: dict[str, str] = {}
    for info in fields_of(key):
        for other, legal in conditions_of(info).items():
            actual = beside[other] if other in beside else _value_at(other, key, taken, given)
            if other != key and not is_one_of(actual, legal):
                least = [legal["minimum"]] if isinstance(legal, Mapping) else legal
                needed[other] = f", with {other} {json.dumps(least[0]) if least else ''}".rstrip()
    return key + told + "".join(needed.values())


def _value_at(other: str, key: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Return the value of another key when a key has its value."""
    here, path = (value, other.removeprefix(f"{key}.")) if other.startswith(f"{key}.") else (given, other)
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return _default(other)
        here = here[part]
    return here


def _default(key: str) -> Any:
    here: Any = Recipe().model_dump()
    for part in key.split("."):
        here = here[part]
    return here
