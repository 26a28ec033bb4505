"""The draft of a recipe, which a tool's rows and rules fill from one of its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.convert.rows import ABSENT, NoCounterpart, Reader, Row, Set, same, same_value
from trainer.convert.schema_keys import default_of, refusal_of, schema_has, unread
from trainer.redaction import redact

LONGEST_SHOWN = 80  # characters of a value in a line


@dataclass(frozen=True)
class Tool:
    """A tool whose files are read.

    | field | meaning |
    |---|---|
    | `title` | its name for a reader |
    | `rows` | its keys; a dotted one is a key of an object |
    | `before` | what is done before the rows |
    | `rules` | what several of its keys say together, in the order in which they are asked |
    """

    title: str
    rows: Mapping[str, Row]
    rules: tuple[Callable[[Draft], None], ...] = ()
    before: tuple[Callable[[Draft], None], ...] = ()


@dataclass(frozen=True)
class Remark:
    """A key of the tool that is not brought, or not wholly, or a key of the recipe that the tool's
    file cannot fill; and why."""

    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


@dataclass
class Draft:
    """The recipe as far as it is known.

    | field | meaning |
    |---|---|
    | `given` | the keys of the tool's file that are not null, by dotted name |
    | `place` | what stands before the tool's keys in a line: "", or the file that a file names |
    | `folder` | where the file lies |
    | `values` | dotted key of the recipe → its value |
    | `origins` | dotted key of the recipe → what it was made of |
    | `missed` | keys of the file without counterpart, or with one that differs |
    | `open` | keys of the recipe that are to be set by hand |
    | `asked` | keys of the file that a row or a rule has looked at |
    """

    tool: Tool
    given: dict[str, Any]
    world_size: int
    folder: Path
    place: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    missed: list[Remark] = field(default_factory=list)
    open: list[Remark] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def fill(self) -> None:
        """Bring every key by its row, and then what several keys say together."""
        for rule in self.tool.before:
            rule(self)
        for name, row in self.tool.rows.items():
            if not row.joint:
                self._bring(name, row)
        for name in self.given:
            if name not in self.tool.rows:
                self.miss(name, f"is no key of {self.tool.title} that is known here")
        for rule in self.tool.rules:
            rule(self)

    def _bring(self, name: str, row: Row) -> None:
        if row.why:
            if name in self.given and not row.asks_for_nothing(self.given[name]):
                self.miss(name, row.why)
        elif (value := self.read(name, row.read)) is not None:
            self.put(row.to, value, name)

    def get(self, name: str) -> Any:
        """Return the value of a key of the tool, or the tool's default; None if it has none."""
        self.asked.add(name)
        row = self.tool.rows[name]
        has_default = row.default is not ABSENT and (not row.within or row.within in self.given)
        return self.given.get(name, row.default if has_default else None)

    @property
    def ranks(self) -> str:
        """Return the number of ranks in words, with the flag that sets it."""
        return f"{self.world_size} {'rank' if self.world_size == 1 else 'ranks'} (--world-size)"

    def read(self, name: str, reader: Reader = same) -> Any:
        """Return the same, read; None, with a remark, if it cannot be."""
        value = self.get(name)
        if value is None or (name in self.given and isinstance(value, str) and not value.strip()):
            return None
        try:
            return reader(value)
        except NoCounterpart as why:
            self.miss(name, str(why))
            return None

    def is_asked(self, name: str) -> bool:
        """Return whether the file gives a key another value than the tool would."""
        return name in self.given and not same_value(self.given[name], self.tool.rows[name].default)

    def put(self, to: str, value: Any, *names: str, by: str = ", ", note: str = "") -> None:
        """Set a key of the recipe, which these keys of the tool, and what `note` says, made.

        A tool's default is written only where a recipe without the key could train otherwise.
        """
        if isinstance(value, Set):
            if value.but:
                self.miss(names[0], value.but)
            for one, inner in value.values.items():
                self.put(one, inner, *names)
            return
        said = not any(name in self.given for name in names)
        if why := refusal_of(to, value):
            if not said:
                self.miss(names[0], f"{to} must be {why}, not {shown(value)}")
        elif not said or to in self.values or to.startswith(BY_TASK) or not same_value(value, default_of(to)):
            self.values[to] = value
            self.origins[to] = by.join([*(self._spelt(name) for name in names), *([note] if note else [])])

    def put_if_there(self, to: str, value: Any, *names: str, instead: str = "") -> bool:
        """Set a key that only later versions of the recipe have; else remark what to do `instead`.

        Return whether the key is there.
        """
        if value is None:
            return False
        if schema_has(to):
            self.put(to, value, *names)
            return True
        if instead and self.is_asked(names[0]):
            self.miss(names[0], instead)
        return False

    def miss(self, name: str, why: str) -> None:
        """Record that a key of the tool is not brought, or not wholly."""
        self.asked.add(name)
        value = self.given.get(name, ABSENT)
        said = f"{self.place}{name}" if value is ABSENT else f"{self.place}{name} = {shown(redact(value, name))}"
        self.missed.append(Remark(said, why))

    def lacks(self, to: str, why: str) -> None:
        """Record that a key of the recipe is to be set by hand."""
        self.open.append(Remark(to, why))

    def take(self, other: Draft) -> None:
        """Add what another file gave; what is known already stays."""
        for to, value in other.values.items():
            if to not in self.values:
                self.values[to], self.origins[to] = value, other.origins[to]
        self.missed += other.missed

    def drop_unread(self) -> None:
        """Remove what nothing would read beside the other values, with a remark where the file gave
        it."""
        while found := next(unread(self.values), None):
            self.drop(*found)

    def drop(self, to: str, why: str) -> None:
        """Remove a key of the recipe, with a remark where the file gave it."""
        origin = self.origins.pop(to, DEFAULT)
        self.values.pop(to, None)
        if not origin.endswith(DEFAULT):
            self.missed.append(Remark(origin, why))

    def _spelt(self, name: str) -> str:
        """Return a key of the tool with its value, and whether the value is the tool's default."""
        value = self.given.get(name, ABSENT)
        if value is ABSENT:
            default = self.tool.rows[name].default
            return f"{name}{'' if default is ABSENT else f' {shown(default)}'}, {self.tool.title}'s{DEFAULT}"
        return f"{self.place}{name}" + (f" {shown(redact(value, name))}" if not isinstance(value, dict | list) else "")


DEFAULT = " default"
# Sections in which the value of an absent key may depend on the task.
BY_TASK = ("optimizer.", "schedule.", "precision.dtype")


def shown(value: Any) -> str:
    """Return a value as JSON, short enough for a line."""
    told = json.dumps(value, ensure_ascii=False, default=str)
    return told if len(told) <= LONGEST_SHOWN else f"{told[: LONGEST_SHOWN - 1]}…"


def flat(given: Mapping[str, Any], rows: Mapping[str, Row], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a file that are not null, by dotted name; an object whose keys have rows is
    entered."""
    for name, value in given.items():
        dotted = f"{at}{name}"
        if isinstance(value, dict) and any(row.startswith(f"{dotted}.") for row in rows):
            yield from flat(value, rows, f"{dotted}.")
        elif value is not None:
            yield dotted, value
