"""Keys that are used only with certain values of another key; see `schema.only`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trainer.schema import Finding, Recipe, Section


def only_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Yield a finding for each written key that nothing would read.

    `given` holds the dotted keys that were written.
    """
    keys = {re.sub(r"\[\d+\]$", "", key) for key in given}  # a list of values is one
    around = {key[: match.start()] for key in keys for match in re.finditer(r"[.\[]", key)}
    for key in sorted(keys - around):
        for value, said in _said_on_the_way(recipe, key):
            ((other, legal),) = _conditions(said).items()
            actual = _value_of(recipe, other)
            if not _asks_for_nothing(value, said) and not _is_one_of(actual, legal):
                instead = f"; {said['instead']}" if "instead" in said else ""
                yield Finding((key, other), f"{key} is used only with {_condition(other, legal, actual)}{instead}")
                break


def _asks_for_nothing(value: Any, said: Mapping[str, Any]) -> bool:
    idle = said.get("idle")
    is_idle = type(value) is type(idle) and value == idle
    return value is None or is_idle or (isinstance(value, Section) and not value.model_fields_set)


def keys_only_with(section: type[Section], other: str) -> set[str]:
    """Return the keys of a section that are used only with some values of the key `other`."""
    extras = ((name, field.json_schema_extra) for name, field in section.model_fields.items())
    return {name for name, extra in extras if isinstance(extra, dict) and other in _conditions(extra)}


def _conditions(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the dotted keys on which a field depends, each with its legal values."""
    conditions: Mapping[str, Any] = extra.get("only", {})
    return conditions


def _said_on_the_way(recipe: Recipe, key: str) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield what the schema says of the key and of the sections around it, outermost first.

    Each comes as a pair, with its value first.
    """
    node: Any = recipe
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
            continue
        # Hugging Face's own keys, or the place of a fault that is reported elsewhere
        if not isinstance(node, Section):
            return
        name = next((n for n, field in type(node).model_fields.items() if part in (n, field.alias)), None)
        if name is None:
            return
        extra = type(node).model_fields[name].json_schema_extra
        node = getattr(node, name)
        if isinstance(extra, dict) and _conditions(extra):
            yield node, extra


def _value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _is_one_of(value: Any, legal: Any) -> bool:
    if isinstance(legal, Mapping):
        return bool(value >= legal["minimum"])
    return value in legal if legal else value is not None


def _condition(other: str, legal: Any, actual: Any) -> str:
    if isinstance(legal, Mapping):
        return f"{other} above {legal['minimum'] - 1}, not {actual}: remove it"
    if not legal:
        return f"{other}: give one, or remove it"
    *most, last = map(json.dumps, legal)
    return f"{other} {', '.join(most)}{' or ' if most else ''}{last}, not {json.dumps(actual)}: remove it"
