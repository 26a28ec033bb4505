"""The targets of a row's positions, where they are not the next token. Shape letter: S sequence
length [tokens]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from trainer import schema
from trainer.data.examples import NO_LABEL
from trainer.data.rows import Row
from trainer.data.sampling import Int64s, stream_key, uniform
from trainer.data.tokenizer import Tokenizer
from trainer.tasks import TASKS

Part = Literal["training", "evaluation"]


class Targets(Protocol):
    # Set if the tokens decide which positions count, so that every rank must read them.
    needs_tokens: ClassVar[bool]

    def mark(self, row: Row, number: int) -> Row:
        """Return the row with the task's tokens, labels and targets; `number` counts rows from the
        run's first on."""


@dataclass(frozen=True)
class NextToken:
    needs_tokens: ClassVar[bool] = False

    def mark(self, row: Row, number: int) -> Row:
        return row


@dataclass(frozen=True)
class LabelOfDocument:
    """Targets that are the labels of documents, each at its document's first or last token: where a
    network has seen all of it."""

    at: Literal["first", "last"]
    needs_tokens: ClassVar[bool] = False

    def mark(self, row: Row, number: int) -> Row:
        ends = np.cumsum(row.documents)
        places = ends - 1 if self.at == "last" else ends - row.documents
        given = np.array(row.document_labels or [NO_LABEL] * len(ends), np.int64)  # filler has none
        has_label = given != NO_LABEL
        labels, is_target = np.zeros_like(row.labels), np.zeros_like(row.is_target)
        labels[places[has_label]] = given[has_label]
        is_target[places[has_label]] = True
        return replace(row, labels=labels, is_target=is_target)


@dataclass(frozen=True)
class MaskedTokens:
    """Targets that are some tokens of a row, to be guessed from those around them (Devlin et al.
    2018, arXiv:1810.04805, §3.1).

    Of the chosen tokens 80 % are masked, 10 % replaced by any ordinary token, and 10 % kept. The
    network does not know which, so it must represent every token. What is drawn for a position
    depends only on `stream`, the row's number and the position: it is the same in every layout and
    after a resume, and differs between epochs.
    """

    fraction: float
    mask: int
    ordinary: Int64s  # tokens that stand for text: only these are chosen, and put in
    stream: int
    # Choose at least one token if possible: a short row might otherwise have nothing to learn.
    never_none: bool
    needs_tokens: ClassVar[bool] = True

    def mark(self, row: Row, number: int) -> Row:
        size = len(row.tokens)
        chosen, kind, other = (uniform(size, stream_key(self.stream, what, number)) for what in ("chosen", "kind", "other"))
        may_be = np.isin(row.tokens, self.ordinary)
        is_target = (chosen < self.fraction) & may_be
        if self.never_none and not is_target.any() and may_be.any():
            is_target[np.argmin(np.where(may_be, chosen, 1.0))] = True
        replaced = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        shown = np.select([kind < 0.8, kind < 0.9], [np.int64(self.mask), replaced], row.tokens)
        return replace(row, tokens=np.where(is_target, shown, row.tokens), labels=row.tokens, is_target=is_target)


def targets_of(data: schema.Data, tokenizer: Tokenizer, *, causal: bool, seed: int, part: Part) -> Targets:
    """Return the targets of a task. `causal`: the network's tokens see only those before them."""
    match TASKS[data.task].target:
        case "label":
            return LabelOfDocument("last" if causal else "first")
        case "masked":
            assert tokenizer.mask is not None
            ordinary = np.array(tokenizer.ordinary_ids, np.int64)
            stream = stream_key(seed, "masks", part)
            return MaskedTokens(data.mask_fraction, tokenizer.mask, ordinary, stream, never_none=data.tails == "train")
        case "next":
            return NextToken()
