"""The loader, from token stores to micro-batches. The only file of trainer.data that imports torch.

Shape letters: B sequences of a micro-batch, S sequence length [tokens].

Sequence i of step s is global sample s · global_sequences + i, whatever the layout. A data-parallel
rank takes a contiguous range of i, so no rank depends on another and there is no loader state: a
run resumes by asking for the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from parallel.documents import Documents
from parallel.loss import IGNORE
from parallel.rng import Streams
from trainer.data.rows import Row, filler_row, held_out_rows, order_fingerprint, row_at
from trainer.data.sampling import num_windows, order_of
from trainer.data.store import TokenStore
from trainer.data.targets import NextToken, Targets

LOOKED_AT = 1 << 16  # global samples located at once in a search
MOST = 15 / 16  # where more of the tokens are targets, it is not worth to single them out


@dataclass(frozen=True)
class MicroBatch:
    """The data of one forward and backward, from the loader to the head."""

    tokens_BS: Tensor  # int64 [B, S]
    documents: Documents
    # int64 [B, S]: the token that a position predicts, IGNORE where there is no target
    labels_BS: Tensor | None = None
    # float64 [documents of all rows]: log-probabilities before training
    reference_R: Tensor | None = None
    streams: Streams | None = None  # of dropout; None: no dropout
    # int64 [L]: the places of the targets in the flattened labels, where they are few enough to be
    # computed alone
    places_L: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Return the number of positions whose loss counts."""
        return int((self.targets_BS != IGNORE).sum())

    @property
    def targets_BS(self) -> Tensor:
        """Return the labels of a micro-batch that has some."""
        assert self.labels_BS is not None, "a micro-batch without labels has no loss"
        return self.labels_BS

    def on(self, device: torch.device, streams: Streams | None = None) -> MicroBatch:
        """Return the micro-batch on a device, with the streams of its dropout."""
        tensors = (self.tokens_BS, self.labels_BS, self.reference_R, self._found_places())
        tokens_BS, labels_BS, reference_R, places_L = (t if t is None else t.to(device, non_blocking=True) for t in tensors)
        assert tokens_BS is not None
        return MicroBatch(tokens_BS, self.documents, labels_BS, reference_R, streams, places_L)

    def _found_places(self) -> Tensor | None:
        """Return `places_L`. They are looked for on the host, because a GPU's host would have to
        wait until it knows how many there are."""
        if self.labels_BS is None or self.labels_BS.device.type != "cpu":
            return self.places_L
        places_L = (self.labels_BS.flatten() != IGNORE).nonzero().squeeze(-1)
        return places_L if len(places_L) <= MOST * self.labels_BS.numel() else None

    def pinned(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch in page-locked memory, from which `on` copies it to that GPU while
        the host goes on. Any thread may call it."""
        with torch.cuda.device(device):  # a new thread's is the first one
            tensors = (self.tokens_BS, self.labels_BS, self.reference_R)
            tokens_BS, labels_BS, reference_R = (t if t is None else t.pin_memory() for t in tensors)
        assert tokens_BS is not None
        return replace(self, tokens_BS=tokens_BS, labels_BS=labels_BS, reference_R=reference_R)

    def without_labels(self) -> MicroBatch:
        """Return the micro-batch as stages of a pipeline before the last take it."""
        return replace(self, labels_BS=None, reference_R=None, places_L=None)


class TrainData:
    """The training samples in their order, without end: epoch after epoch of every source, blended
    by weight or by size."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None,
        *,
        row_tokens: int,
        seed: int,
        isolate_documents: bool,
        global_sequences: int,
        tails: bool = True,
        targets: Targets | None = None,
    ) -> None:
        """Prepare the order of the samples. ValueError if a store has no sample.

        `weights`: one per store, relative; None: by size. `tails`: the rest of a store beyond its
        whole sequences is one more, shorter sequence. `targets` None: the next tokens.
        """
        self._stores = tuple(stores)
        self._order = order_of(weights, [num_windows(store.num_tokens, row_tokens, tails=tails) for store in stores], seed)
        self._row_tokens = row_tokens
        self._isolate_documents = isolate_documents
        self._global_sequences = global_sequences
        self._targets = targets or NextToken()
        self.fingerprint = order_fingerprint(
            stores, weights, row_tokens=row_tokens, seed=seed, isolate_documents=isolate_documents, tails=tails
        )

    @property
    def num_samples(self) -> int:
        """The number of sequences in all stores: one epoch if sources are taken by size."""
        return sum(self._order.sizes)

    def described(self, names: Sequence[str], steps: int) -> Iterator[str]:
        """Yield a line for each source: its sequences, its share of the steps, how often they pass
        over it, and what is left out of it."""
        drawn = steps * self._global_sequences
        for name, store, size, share in zip(names, self._stores, self._order.sizes, self._order.shares, strict=True):
            left_out = max(0, store.num_tokens - 1 - size * self._row_tokens)
            yield (
                f"{name}: {size:,} sequence{'s' if size > 1 else ''}, {share:.1%} of the steps, "
                f"{drawn * share / size:.3g} passes in {steps:,} steps"
                + (f'; data.tails "drop" leaves out its last {left_out:,} tokens' if left_out else "")
            )

    def place_of(self, number: int) -> tuple[int, int]:
        """Return which store a global sample is from, and which of its sequences it is."""
        sources, samples = self._order.locate([number])
        return int(sources[0]), int(samples[0])

    def first_time(self, source: int, sample: int, *, within: int) -> int | None:
        """Return the number of the first global sample that is this sequence of a store; None if
        none of the first `within` is."""
        for begin in range(0, within, LOOKED_AT):
            sources, samples = self._order.locate(np.arange(begin, min(begin + LOOKED_AT, within)))
            if len(found := np.flatnonzero((sources == source) & (samples == sample))):
                return begin + int(found[0])
        return None

    def micro_batches(
        self, step: int, *, dp_rank: int, dp: int, micro_sequences: int, read: bool = True
    ) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step (the first is 0), with B = micro_sequences.

        With `read` False the tokens are left out.
        """
        mine, rest = divmod(self._global_sequences, dp)
        assert rest == 0 and mine % micro_sequences == 0, (self._global_sequences, dp, micro_sequences)  # noqa: PT018
        first = step * self._global_sequences + dp_rank * mine
        numbers = np.arange(first, first + mine)
        sources, samples = self._order.locate(numbers)
        rows = [
            self._row(source, sample, number, read=read)
            for source, sample, number in zip(sources.tolist(), samples.tolist(), numbers.tolist(), strict=True)
        ]
        yield from _batched(rows, micro_sequences)

    def _row(self, source: int, sample: int, number: int, *, read: bool) -> Row:
        row = row_at(
            self._stores[source],
            sample * self._row_tokens,
            row_tokens=self._row_tokens,
            isolate_documents=self._isolate_documents,
            read=read or self._targets.needs_tokens,
        )
        return self._targets.mark(row, number)


class EvalData:
    """The held-out documents in order, at most `sequences` sequences of them, the same at every
    evaluation."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        row_tokens: int,
        isolate_documents: bool,
        sequences: int,
        targets: Targets | None = None,
    ) -> None:
        """Read the sequences. `targets` None: the next tokens."""
        self._filler = filler_row(stores[0], row_tokens)
        rows = held_out_rows(stores, row_tokens=row_tokens, isolate_documents=isolate_documents, sequences=sequences)
        self._rows = [(targets or NextToken()).mark(row, number) for number, row in enumerate(rows)]

    @property
    def num_sequences(self) -> int:
        return len(self._rows)

    def micro_batches(self, *, dp_rank: int, dp: int, micro_sequences: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, B = micro_sequences: the same number on every rank,
        filled up with rows without a target."""
        mine = -(-self.num_sequences // (dp * micro_sequences)) * micro_sequences
        rows = self._rows[dp_rank * mine : (dp_rank + 1) * mine]
        rows += [self._filler] * (mine - len(rows))
        yield from _batched(rows, micro_sequences)


class Sweep:
    """A pass over every row of one store, once and in order, with documents isolated. Each
    data-parallel rank has consecutive rows."""

    def __init__(self, store: TokenStore, *, row_tokens: int, dp_rank: int, dp: int, micro_sequences: int) -> None:
        self._store, self._row_tokens, self._micro_sequences = store, row_tokens, micro_sequences
        # Whole ones, in a store of rows.
        self._num_rows = num_windows(store.num_tokens, row_tokens, tails=False)
        self.num_micro_batches = -(-self._num_rows // (dp * micro_sequences))  # of each rank
        self._first_row = min(dp_rank * self.num_micro_batches * micro_sequences, self._num_rows)

    @property
    def first_document(self) -> int:
        """The index, in the store, of the first document in this rank's rows."""
        return self._store.documents.searchsorted([self._first_row * self._row_tokens], "left")[0]

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield the same number of micro-batches on every rank, the last ones filled up with rows
        without a target."""
        yield from _batched(self._rows(), self._micro_sequences)

    def _rows(self) -> Iterator[Row]:
        mine = range(self._first_row, self._first_row + self.num_micro_batches * self._micro_sequences)
        for number in mine:
            if number < self._num_rows:
                yield row_at(self._store, number * self._row_tokens, row_tokens=self._row_tokens, isolate_documents=True)
            else:
                yield filler_row(self._store, self._row_tokens)


def _batched(rows: Iterable[Row], micro_sequences: int) -> Iterator[MicroBatch]:
    remaining = iter(rows)
    while chosen := list(islice(remaining, micro_sequences)):
        references = [row.reference for row in chosen if row.reference is not None]
        yield MicroBatch(
            tokens_BS=torch.from_numpy(np.stack([row.tokens for row in chosen])),
            labels_BS=torch.from_numpy(np.stack([np.where(row.is_target, row.labels, IGNORE) for row in chosen])),
            documents=Documents(tuple(row.documents for row in chosen)),
            reference_R=torch.from_numpy(np.concatenate(references)) if references else None,
        )
