"""The common ground of tasks that learn from rows: source row → example → tokenized documents → row
of tokens.

A task brings a `RowFormat` (`row_format.py`), which needs no tokenizer, and an `Examples`, which
has one. See `tasks.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from trainer import schema
from trainer.data.tokenizer import Tokenizer

NO_LABEL = -1


@dataclass(frozen=True)
class Document:
    """A run of tokens that attend to one another.

    `is_target`: bool [tokens], which of them are to be predicted. `label`: a label of the whole, an
    int32 that means what the task says, such as the number of a class.
    """

    ids: list[int]
    is_target: npt.NDArray[np.bool_]
    label: int = NO_LABEL


@dataclass(frozen=True)
class Tokenized:
    """An example as tokens; without documents it is left out.

    `content`: the example itself, the same with every tokenizer and length, so that with all of
    them it is held out or not. `counts`: what became of it, summed over a source for `remarks`.
    """

    documents: tuple[Document, ...]
    content: bytes
    counts: Counter[str]


@dataclass(frozen=True)
class RowLayout:
    """The layout of examples in a row. A row holds whole examples only, so that none is learned in
    part.

    A row has `parts` of `part_tokens` each. With one part, the `documents_each` documents of an
    example follow one another. With several there are as many documents as parts, each in its own
    part, at the same index there. What is left of a part is one more document without targets,
    which is always present in a row of several parts.
    """

    part_tokens: int
    parts: int = 1
    documents_each: int = 1
    labelled: bool = False

    @property
    def row_tokens(self) -> int:
        return self.parts * self.part_tokens

    @property
    def capacity(self) -> int:
        """The largest number of tokens that examples may take in a part."""
        return self.part_tokens - (self.parts > 1)

    def room(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens that each example takes of a part, int64 [examples], from the lengths
        of all documents [documents]."""
        of_examples = lengths.reshape(-1, self.documents_each)
        return np.asarray(of_examples.sum(1) if self.parts == 1 else of_examples.max(1))

    def documents_of(self, examples: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Return the documents in each part of a row that has these examples."""
        documents = examples[:, None] * self.documents_each + np.arange(self.documents_each)
        return [documents.ravel()] if self.parts == 1 else list(documents.T)


class Conversing(Protocol):
    """An object that puts questions to a model in the form of its conversations."""

    def prompt(self, text: str, *, key: str = ...) -> list[int]:
        """Return the tokens of a user's message, up to where the answer begins. RecipeError names
        the `key`."""

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""


class Examples(ABC):
    """A task's way to write its examples with one tokenizer."""

    noun: ClassVar[str]  # the plural name of its examples, for messages
    tokenizer: Tokenizer
    # The keyword arguments that make it again, besides the tokenizer, as JSON.
    settings: dict[str, Any]
    layout: RowLayout

    def __init__(self, tokenizer: Tokenizer, **settings: Any) -> None:
        self.tokenizer, self.settings = tokenizer, settings

    @classmethod
    @abstractmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Self: ...

    @property
    def chat(self) -> Conversing | None:
        """The writer of conversations, if the model learns to hold them."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The fingerprint, equal where every example gives the same tokens, targets and labels."""

    @abstractmethod
    def tokenize(self, example: Any) -> Tokenized:
        """Return the example as tokens. Fault if it cannot be written."""

    @abstractmethod
    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        """Yield remarks on the examples of a source that are not learned whole."""

    @abstractmethod
    def nothing(self, counts: Mapping[str, int]) -> str:
        """Return why no example of a source is left, and the remedy."""
