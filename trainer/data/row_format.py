"""How rows become examples, before there is a tokenizer: one may be trained on the texts that are found in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from trainer import sections


@dataclass(frozen=True)
class RowFormat(ABC):
    """How the rows of one source become examples of a task. Its fields are JSON values: it travels to other processes and is
    part of the source's fingerprint."""

    @classmethod
    @abstractmethod
    def of_source(cls, source: sections.Source) -> Self:
        """As the recipe describes the source."""

    @abstractmethod
    def example_of(self, row: Mapping[str, Any]) -> Any:
        """Fault when the row is none."""

    @abstractmethod
    def texts_of(self, example: Any) -> Iterator[str]:
        """What a tokenizer is trained on."""


def renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names. `fields`: our name of a field → the name in this source."""
    return {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
