"""The count of each source: how many rows became how many documents and sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.data import PreparedData
from trainer.data.prepared import counts_of
from trainer.data.sampling import num_windows
from trainer.data.store import TokenStore
from trainer.schema import Data

COUNTED = 1 << 20  # documents read at once


def account(data: Data, prepared: PreparedData) -> Iterator[str]:
    """Yield two lines for each source of training: what became of its rows, and how the rest is
    packed."""
    held_out = {store.path.parent: store for store in prepared.evaluation}
    noun = prepared.examples.noun if prepared.examples else "documents"
    for name, store in zip(prepared.sources, prepared.train, strict=True):
        other = held_out.get(store.path.parent)
        trained, held = num_examples(store), num_examples(other) if other else 0
        read = counts_of(store.path.parent)["read"] or trained + held
        left_out = f", {read - trained - held:,} of them left out" if read > trained + held else ""
        sides = f"{trained:,} to train, {held:,} held out"
        if trained + held > read:  # a single text
            sides = f"{trained:,} to train, of which the end is held out"
        yield f"{name}: {read:,} {_counted(read, noun)} read{left_out}: {sides}"
        yield f"{name}: {_packed(store, data, noun)}"


def _counted(number: int, noun: str) -> str:
    return noun.removesuffix("s") if number == 1 else noun


def num_examples(store: TokenStore) -> int:
    """Return how many examples or texts are in a store, without what fills up its sequences."""
    return store.packing.examples if store.packing else store.num_documents


def _packed(store: TokenStore, data: Data, noun: str) -> str:
    kept, size = num_examples(store), data.row_tokens
    if store.packing:
        rows = store.num_tokens // size
        learned, filler = (count / store.num_tokens for count in (store.packing.targets, store.packing.filler))
        return (
            f"{kept:,} {_counted(kept, noun)} packed, each whole, into {rows:,} sequences of {size:,} tokens, "
            f"{kept / rows:.2f} in each on average; {learned:.1%} of the tokens are targets, {filler:.1%} fill up sequences"
        )
    windows = num_windows(store.num_tokens, size, tails=data.tails == "train")
    return (
        f"{kept:,} {_counted(kept, noun)}, {store.num_tokens:,} tokens, laid end to end and cut into {windows:,} sequences of "
        f"{size:,} tokens; in more than one sequence: {_divided(store, size):,}"
    )


def _divided(store: TokenStore, size: int) -> int:
    """Return how many documents of a store lie in more than one sequence."""
    found = 0
    for first in range(0, store.num_documents, COUNTED):
        cuts = store.documents[first : first + COUNTED + 1]
        found += int(np.count_nonzero(cuts[:-1] // size != (cuts[1:] - 1) // size))
    return found
