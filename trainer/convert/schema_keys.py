"""The keys of a recipe, asked by their dotted names: which are there, what they take, and which of
them nothing would read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trainer.schema import Recipe, Section


def schema_has(key: str) -> bool:
    """Return whether a recipe of this version has the key."""
    return len(fields_of(key)) == key.count(".") + 1


def default_of(key: str) -> Any:
    """Return the value of a key that is not written."""
    value: Any = Recipe()
    for part in key.split("."):
        value = getattr(value, _attribute(type(value), part))
    return value


def refusal_of(key: str, value: Any) -> str:
    """Return why a key cannot have the value, whatever else is in the recipe; "" if it can."""
    path = tuple(key.split("."))
    try:
        Recipe.model_validate(nested({key: value}))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            if detail["loc"][: len(path)] == path:
                return detail["msg"].removeprefix("Input should be ")
    return ""


def unread(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that nothing would read beside these values, with the condition under which it
    is read."""
    for key in values:
        for info in fields_of(key):
            for other, legal in conditions_of(info).items():
                actual = values[other] if other in values else default_of(other)
                if not is_one_of(actual, legal):
                    yield key, f"{key} is used only with {condition(other, legal)}"


def conditions_of(info: FieldInfo) -> Mapping[str, Any]:
    """Return the dotted keys on which a field depends, each with its legal values."""
    extra = info.json_schema_extra
    conditions: Any = extra.get("only", {}) if isinstance(extra, dict) else {}
    return dict(conditions)


def condition(other: str, legal: Any) -> str:
    """Return the words for the values of another key with which a key is used."""
    if isinstance(legal, Mapping):
        return f"{other} of {legal['minimum']} or more"
    return f"{other} {' or '.join(map(str, legal))}" if legal else other


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that has these values under their dotted keys, its sections in the order of
    the schema."""
    recipe: dict[str, Any] = {}
    order = list(Recipe.model_fields)
    for key in sorted(values, key=lambda key: order.index(key.partition(".")[0])):
        here, *path = recipe, *key.split(".")
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = values[key]
    return recipe


def fields_of(key: str) -> list[FieldInfo]:
    """Return the fields from the section to the key, as many of them as there are; those of an item
    of a list too."""
    found: list[FieldInfo] = []
    section: Any = Recipe
    for part in re.sub(r"\[\d*\]", "", key).split("."):
        if section is None:
            break
        info = section.model_fields.get(_attribute(section, part))
        if info is None:
            break
        found.append(info)
        section = next((one for one in (info.annotation, *get_args(info.annotation)) if _is_section(one)), None)
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _attribute(section: type[Section], key: str) -> str:
    return next((name for name, info in section.model_fields.items() if info.alias == key), key)


def is_one_of(value: Any, legal: Any) -> bool:
    """Return whether another key's value is one with which a key is used."""
    if isinstance(legal, Mapping):
        return bool(value >= legal["minimum"])
    return value in legal if legal else value is not None
