"""The perplexity that a model must beat to have learned more than the frequency of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from trainer.data.rows import held_out_rows
from trainer.data.store import TokenStore
from trainer.data.targets import NextToken, Targets

# Chunks counted per store: more hardly change the frequencies, and a large corpus would take
# minutes.
MAX_CHUNKS = 64


def unigram_perplexity(
    train_stores: Sequence[TokenStore],
    eval_stores: Sequence[TokenStore],
    vocab_size: int,
    *,
    row_tokens: int,
    isolate_documents: bool,
    sequences: int,
    targets: Targets | None = None,
) -> float:
    """Return exp of the mean −log p over the targets of an evaluation, with p = (count in training
    + 1) / (all + vocab_size).

    Both are counted over tokens that are to be predicted. `row_tokens`, `isolate_documents`,
    `sequences` and `targets` are those of `EvalData`, so that the targets are those of the
    evaluation itself. ValueError if there is no target.
    """
    counts = np.ones(vocab_size, np.int64)
    for store in train_stores:
        for chunk in islice(store.target_chunks(), MAX_CHUNKS):
            counts += np.bincount(chunk, minlength=vocab_size)
    predicted = np.zeros(vocab_size, np.int64)
    rows = held_out_rows(eval_stores, row_tokens=row_tokens, isolate_documents=isolate_documents, sequences=sequences)
    for number, row in enumerate(rows):
        marked = (targets or NextToken()).mark(row, number)
        predicted += np.bincount(marked.labels[marked.is_target], minlength=vocab_size)
    if not predicted.any():
        raise ValueError("no held-out target to predict")
    nats = np.log(counts.sum()) - np.log(counts)
    return float(np.exp((predicted * nats).sum() / predicted.sum()))
