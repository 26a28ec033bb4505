"""The row of a key of another tool, and the readers of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ABSENT: Any = object()  # the default of a key of which the tool has none, or none that matters here
ASKS_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


class NoCounterpart(Exception):
    """The reason why a value of another tool becomes none here."""


@dataclass(frozen=True)
class Set:
    """Several keys of a recipe that one value sets. `but`: in what the training differs then; "" if
    in nothing."""

    values: Mapping[str, Any] = field(default_factory=dict)
    but: str = ""


Reader = Callable[[Any], Any]


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Row:
    """A key of another tool.

    | field | meaning |
    |---|---|
    | `to` | the key of a recipe that it becomes, or that is nearest to it; "": none |
    | `read` | makes our value of theirs, or a `Set`; raises NoCounterpart if there is none |
    | `why` | why it becomes no key, with the nearest remedy; "": it becomes `to` |
    | `joint` | it is read together with other keys, by a rule of the tool |
    | `default` | the tool's own value where the key is not written |
    | `idle` | further values with which a key without counterpart asks for nothing |
    | `within` | the key without which the tool has no default either; "": it always has |
    """

    to: str = ""
    read: Reader = same
    why: str = ""
    joint: bool = False
    default: Any = ABSENT
    idle: tuple[Any, ...] = ()
    within: str = ""

    def asks_for_nothing(self, value: Any) -> bool:
        """Return whether a value of a key without counterpart changes nothing."""
        if value is None or any(same_value(value, nothing) for nothing in self.idle):
            return True
        if self.default is not ABSENT:
            return same_value(value, self.default)
        return any(same_value(value, nothing) for nothing in ASKS_NOTHING)


def key(to: str, read: Reader = same, default: Any = ABSENT, within: str = "") -> Row:
    """Return the row of a key that becomes one of ours."""
    return Row(to=to, read=read, default=default, within=within)


def joint(to: str, default: Any = ABSENT, read: Reader = same) -> Row:
    """Return the row of a key that a rule reads together with others; `to` is what it is mostly
    about, `read` what it would be alone."""
    return Row(to=to, joint=True, default=default, read=read)


def none(why: str, default: Any = ABSENT, near: str = "", idle: tuple[Any, ...] = ()) -> Row:
    """Return the row of a key that has no counterpart. `near`: a key that does the most like it."""
    return Row(to=near, why=why, default=default, idle=idle)


def same_value(one: Any, other: Any) -> bool:
    """Return whether two values of a tool are the same to it: 3 and 3.0 are, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


# ------------------------------------------------------------------------------------------ readers


def number(value: Any) -> float:
    """Return a number, which YAML gives as a text where it is written 1e-5."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise NoCounterpart("it is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NoCounterpart("it is not a number")
    return value


def whole(value: Any) -> int:
    """Return a whole number, also from 1e9."""
    found = number(value)
    if found != int(found):
        raise NoCounterpart("it is not a whole number")
    return int(found)


def yes(value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise NoCounterpart("it is neither true nor false")
    return value


def text(value: Any) -> str:
    """Return a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise NoCounterpart("it is not a text")
    return value.strip()


def listed(value: Any) -> list[str]:
    """Return the items of a list, or of a text with commas between them."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise NoCounterpart("it is not a list")
    return [str(item).strip() for item in items if str(item).strip()]


def if_true(values: Mapping[str, Any], but: str = "") -> Reader:
    """Return a reader of a switch that sets these keys where it is on."""
    return lambda value: Set(values, but) if yes(value) else Set()


def words(meanings: Mapping[Any, Any], otherwise: str = "") -> Reader:
    """Return a reader that looks the value up, in lower case. `otherwise`: what is said of any
    other value."""

    def read(value: Any) -> Any:
        name = value.lower() if isinstance(value, str) else value
        if isinstance(name, list | dict) or name not in meanings:
            raise NoCounterpart(otherwise or f"it is none of {', '.join(map(str, meanings))}")
        return meanings[name]

    return read


def several(why: str, *names: str) -> dict[str, Row]:
    """Return the rows of keys that have no counterpart, for the same reason."""
    return {name: none(why) for name in names}
