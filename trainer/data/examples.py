"""What the tasks that learn from rows have in common: a row of a source → an example → tokenized documents → a row of tokens.

A task brings a `RowFormat` (`row_format.py`), which needs no tokenizer, and an `Examples`, which has one: see `tasks.py`.
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
    """Tokens that attend to one another. `is_target`: bool [tokens], which of them are to be predicted. `label`: a class of
    the whole."""

    ids: list[int]
    is_target: npt.NDArray[np.bool_]
    label: int = NO_LABEL


@dataclass(frozen=True)
class Tokenized:
    """An example as tokens. No document: it is left out. `content`: the example itself, the same with every tokenizer and
    length, so that it is held out or not with each. `counts`: what became of it, summed over a source for `remarks`."""

    documents: tuple[Document, ...]
    content: bytes
    counts: Counter[str]


@dataclass(frozen=True)
class RowLayout:
    """How examples lie in a row: whole ones only, so that none is learned in part.

    A row has `parts` of `part_tokens` each. With one part, the `documents_each` documents of an example follow one another;
    with several there are as many documents as parts, and each lies in its own, at the same place among the others. What is
    left of a part is one more document without targets, which in a row of several parts is never missing.
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
        """Most tokens of the examples in a part."""
        return self.part_tokens - (self.parts > 1)

    def room(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What each example takes of a part, int64 [examples], from the lengths of all documents [documents]."""
        of_examples = lengths.reshape(-1, self.documents_each)
        return np.asarray(of_examples.sum(1) if self.parts == 1 else of_examples.max(1))

    def documents_of(self, examples: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """The documents in each part of a row that has these examples."""
        documents = examples[:, None] * self.documents_each + np.arange(self.documents_each)
        return [documents.ravel()] if self.parts == 1 else list(documents.T)


class Conversing(Protocol):
    """What asks a model as its conversations are written."""

    def prompt(self, text: str, *, key: str = ...) -> list[int]:
        """Return the tokens of a user's message, up to where the answer begins; RecipeError that names the key."""

    @property
    def end_of_turn(self) -> int:
        """Return the token that ends an answer."""


class Examples(ABC):
    """How a task writes its examples with one tokenizer."""

    noun: ClassVar[str]  # several examples, in messages
    tokenizer: Tokenizer
    settings: dict[str, Any]  # the keyword arguments beside the tokenizer that make it again, as JSON
    layout: RowLayout

    def __init__(self, tokenizer: Tokenizer, **settings: Any) -> None:
        self.tokenizer, self.settings = tokenizer, settings

    @classmethod
    @abstractmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Self: ...

    @property
    def chat(self) -> Conversing | None:
        """What writes conversations, where they are what the model learns to hold."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal where every example gives the same tokens, targets and labels."""

    @abstractmethod
    def tokenize(self, example: Any) -> Tokenized:
        """Fault when it cannot be written."""

    @abstractmethod
    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        """What is to be said of the examples of a source that are not learned whole."""

    @abstractmethod
    def nothing(self, counts: Mapping[str, int]) -> str:
        """Why no example of a source is left, and the remedy."""
