"""A sequence cut from a store, and its positions that are targets. Shape letter: S sequence length
[tokens]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainer.data.digests import fingerprint_of
from trainer.data.sampling import Int64s, held_out_windows
from trainer.data.store import TokenStore


@dataclass(frozen=True)
class Row:
    """A sequence of S tokens, what each position predicts, and whether it counts."""

    tokens: Int64s  # int64 [S]
    labels: Int64s  # int64 [S]: the next token, unless a task has another target
    is_target: npt.NDArray[np.bool_]  # bool [S]
    documents: tuple[int, ...]  # lengths of the documents in the row, summing to S
    # Labels of the documents: NO_LABEL for none; () if the store has no labels.
    document_labels: tuple[int, ...] = ()
    # float64 [documents]: their log-probabilities before training
    reference: npt.NDArray[np.float64] | None = None


def row_at(store: TokenStore, begin: int, *, row_tokens: int, isolate_documents: bool, read: bool = True) -> Row:
    """Return the row whose first token is token `begin` of the store, with filler without targets
    beyond the end of the store.

    Targets are those of the store. With `isolate_documents` the row is divided where documents end,
    and the last token of a document predicts nothing, since the next token belongs to another.
    Without it the row is one document. Filler is a document of its own. With `read` False documents
    and targets are right but tokens are filler, for ranks that need no tokens.
    """
    length = min(row_tokens, store.num_tokens - begin - 1)
    row = filler_row(store, row_tokens)
    if read:
        stream = store.slice(begin, begin + length + 1)
        row.tokens[:length] = stream[:-1]
        row.labels[:length] = stream[1:]
    row.is_target[:length] = store.targets(begin + 1, begin + length + 1)
    if not isolate_documents:
        return row if length == row_tokens else replace(row, documents=(length, row_tokens - length))
    ends = store.document_ends(begin, begin + length)
    row.is_target[ends - 1] = False
    cuts = np.unique([0, *ends, length, row_tokens])
    labels = tuple(store.labels(begin, begin + length).tolist()) if store.labelled else ()
    reference = store.reference(begin, begin + length)
    return Row(row.tokens, row.labels, row.is_target, tuple(np.diff(cuts).tolist()), labels, reference)


def filler_row(store: TokenStore, row_tokens: int) -> Row:
    """Return a row of end-of-document tokens without a target, with one document in each part."""
    parts = store.packing.parts if store.packing else 1
    filler = np.full(row_tokens, store.contents.end_of_document, np.int64)
    reference = None if store.reference(0, 0) is None else np.zeros(1)
    return Row(filler, filler.copy(), np.zeros(row_tokens, dtype=bool), (row_tokens // parts,) * parts, reference=reference)


def held_out_rows(stores: Sequence[TokenStore], *, row_tokens: int, isolate_documents: bool, sequences: int) -> Iterator[Row]:
    """Yield the rows of an evaluation in order, at most `sequences`, from every store in proportion
    to its tokens."""
    for window in held_out_windows([store.num_tokens for store in stores], row_tokens, sequences):
        yield row_at(stores[window.store], window.begin, row_tokens=row_tokens, isolate_documents=isolate_documents)


def order_fingerprint(
    stores: Sequence[TokenStore],
    weights: Sequence[float] | None,
    *,
    row_tokens: int,
    seed: int,
    isolate_documents: bool,
    tails: bool,
) -> str:
    """Return a fingerprint that is equal if every sample is.

    It covers content, weights (None: by size), length, order, and whether the rest of a store
    beyond its whole sequences is one more sequence, if there is such a rest.
    """
    by_size: Sequence[None] = [None] * len(stores)
    contents = [[store.fingerprint, weight] for store, weight in zip(stores, weights or by_size, strict=True)]
    has_tails = tails and any((store.num_tokens - 1) % row_tokens for store in stores)
    return fingerprint_of([contents, row_tokens, seed, isolate_documents, *(["tails"] if has_tails else [])])
