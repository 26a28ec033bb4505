"""The base class of formats that make examples from rows, without a tokenizer: one may be trained
on the texts found there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from trainer import schema

UNREAD = "unread:"  # prefix of a key's name in the counts of a source
SHOWN_KEYS = 12


@dataclass(frozen=True)
class RowFormat(ABC):
    """A way in which the rows of one source become examples of a task.

    Its fields are JSON values: it travels to other processes and is part of the source's
    fingerprint.
    """

    @classmethod
    @abstractmethod
    def of_source(cls, source: schema.Source) -> Self:
        """Build the format that the recipe describes for the source."""

    @abstractmethod
    def example_of(self, row: Mapping[str, Any]) -> Any:
        """Return the example in a row. Fault if there is none."""

    @abstractmethod
    def texts_of(self, example: Any) -> Iterator[str]:
        """Yield the texts that a tokenizer is trained on."""

    @abstractmethod
    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        """Return the keys of a row that are read, or would be if the row had them."""

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Return the keys that the row has and nobody reads, in the form that is counted."""
        return unread_of(row, self.keys_read(row))


def unread_of(row: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return a row's keys besides those that are `read`, in the form that is counted. null is no
    value."""
    return [f"{UNREAD}{key}" for key, value in row.items() if value is not None and key not in read]


def unread_keys(counts: Mapping[str, int]) -> str | None:
    """Return a line about keys that nobody reads, or None if there are none."""
    found = {name.removeprefix(UNREAD): count for name, count in counts.items() if name.startswith(UNREAD)}
    if not found:
        return None
    said = [f"{key} ({count:,})" for key, count in sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))]
    more = f" and {len(said) - SHOWN_KEYS} more" if len(said) > SHOWN_KEYS else ""
    return f"keys of rows that nothing reads: {', '.join(said[:SHOWN_KEYS])}{more}"


def renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with our names. `fields`: our name of a field → its name in this source."""
    return {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
