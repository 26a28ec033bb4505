"""How rows become examples, before there is a tokenizer: one may be trained on the texts that are found in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from trainer import schema

UNREAD = "unread:"  # before a key's name in the counts of a source
SHOWN_KEYS = 12


@dataclass(frozen=True)
class RowFormat(ABC):
    """How the rows of one source become examples of a task. Its fields are JSON values: it travels to other processes and is
    part of the source's fingerprint."""

    @classmethod
    @abstractmethod
    def of_source(cls, source: schema.Source) -> Self:
        """As the recipe describes the source."""

    @abstractmethod
    def example_of(self, row: Mapping[str, Any]) -> Any:
        """Fault when the row is none."""

    @abstractmethod
    def texts_of(self, example: Any) -> Iterator[str]:
        """What a tokenizer is trained on."""

    @abstractmethod
    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        """The keys of a row that are read, or would be if the row had them."""

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Keys that the row has and nobody reads, as they are counted."""
        return unread_of(row, self.keys_read(row))


def unread_of(row: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Keys that a row has beside those that are `read`, as they are counted; null is no value."""
    return [f"{UNREAD}{key}" for key, value in row.items() if value is not None and key not in read]


def unread_keys(counts: Mapping[str, int]) -> str | None:
    """Return what is to be said of keys that nobody reads, one line of all; None where there are none."""
    found = {name.removeprefix(UNREAD): count for name, count in counts.items() if name.startswith(UNREAD)}
    if not found:
        return None
    said = [f"{key} ({count:,})" for key, count in sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))]
    more = f" and {len(said) - SHOWN_KEYS} more" if len(said) > SHOWN_KEYS else ""
    return f"keys of rows that nothing reads: {', '.join(said[:SHOWN_KEYS])}{more}"


def renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names. `fields`: our name of a field → the name in this source."""
    return {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
