"""Marks of where a value was written, and the way in which messages name the place, the key and the
value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.redaction import printable

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Mark:
    """The place where a value was written. Marks sort in the order in which the user reads."""

    layer: int
    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name

    @property
    def origin(self) -> str:
        return f"file {self.name}" if self.line else "--set"


@dataclass(frozen=True)
class Problem:
    """An error in the recipe, with its place."""

    mark: Mark
    message: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"


def first_mark(keys: Sequence[str], marks: Mapping[str, Mark]) -> Mark:
    """Return the mark of the first of these keys that is written."""
    return next(marks[key] for key in (*keys, "") if key in marks)


def dotted(path: KeyPath) -> str:
    """Return a path as a user writes it after --set: data.sources[0].path."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def path_of(key: str) -> KeyPath:
    """Return the path that a dotted key stands for."""
    return tuple(int(part) if part.isascii() and part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key))


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every value with its path. Objects and lists of objects are entered, other lists are
    values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def pattern(key: str) -> str:
    """Return a dotted key with [] for each number in it: data.sources[].path."""
    return re.sub(r"\[\d+\]", "[]", key)


def put(value: Any, path: KeyPath, leaf: Any) -> None:
    """Set the value at a path."""
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = leaf


def kind(value: Any) -> str:
    """Return the JSON type of a value, in words."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
