"""Matrices over the vocabulary, divided by rows over the tensor ranks, and single rows of them that
are trained alone.

While such a matrix is frozen (tuning), the rows of some new tokens may still be trained. They are a
tensor of their own, [R, D] in the order of the tokens' ids, which starts as the matrix's rows and
takes their place. It is small, and so are its gradient and its optimizer state.

Shape letters: N tokens of a micro-batch, D model, V vocabulary, R tokens with rows of their own, M
the most of them that one tensor rank has: every rank holds M rows, of which the last may be
padding.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, ShardSpec
from parallel.pieces import Piece
from parallel.tensor import TensorParallel


def vocabulary_shard(vocab_size: int, group: Group) -> tuple[int, int]:
    """Return (first, rows) of this rank. The vocabulary is padded to a multiple of the degree."""
    rows = -(-vocab_size // group.size)
    return group.rank * rows, rows


def vocabulary_piece(name: str, shape: tuple[int, ...], group: Group) -> Piece:
    """Return the unpadded rows of a [V] or [V, D] tensor that this rank holds: none on a rank that
    has only padding."""
    vocab_size, *features = shape
    first, rows = vocabulary_shard(vocab_size, group)
    first = min(first, vocab_size)
    return Piece(name, shape, (first, *[0] * len(features)), (min(rows, vocab_size - first), *features))


class VocabularyMatrix(Sharded):
    """The rows `weight` [V/p, D] that this rank holds of a matrix over the vocabulary; subclasses
    use them.

    `token_rows` [M, D]: None, or the rows of some tokens that replace the matrix's (`train_rows`),
    those at `places` of it.
    """

    weight: nn.Parameter
    token_rows: nn.Parameter | None

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.token_rows = None
        self.places: tuple[int, ...] = ()
        self._lookup: Tensor | None = None

    def declare_weight(
        self, name: str, vocab_size: int, hidden_size: int, role: Role, init: Init, tied_over: Group | None
    ) -> None:
        """Declare this rank's rows of the [V, D] tensor `name`, padding included."""
        rows = vocabulary_shard(vocab_size, self.tp.group)[1]
        piece = vocabulary_piece(name, (vocab_size, hidden_size), self.tp.group)
        spec = ShardSpec(role, init, (piece,), tied_over or Group.alone(), tied=tied_over is not None)
        self.declare("weight", (rows, hidden_size), spec)

    def train_rows(self, tokens: Sequence[int], name: str) -> None:
        """Declare rows of their own for these tokens, in the order of their ids, as the logical
        tensor `name` [R, D].

        They do not decay, because the frozen rows beside them do not either.
        """
        spec = self.specs["weight"]
        vocab_size, hidden_size = spec.pieces[0].shape
        rows = vocabulary_shard(vocab_size, self.tp.group)[1]
        cuts = [bisect_left(tokens, rank * rows) for rank in range(self.tp.group.size + 1)]
        begin, end = cuts[self.tp.group.rank : self.tp.group.rank + 2]
        most = max(after - before for before, after in itertools.pairwise(cuts))
        piece = Piece(name, (len(tokens), hidden_size), (begin, 0), (end - begin, hidden_size))
        beside = replace(spec, role=Role.EMBEDDING, init=Init(), pieces=(piece,), added=True)
        self.declare("token_rows", (most, hidden_size), beside)
        self.places = tuple(token - self.tp.group.rank * rows for token in tokens[begin:end])

    def share_rows(self, owner: VocabularyMatrix) -> None:
        """Use the rows of the matrix to which this one is tied."""
        self.borrow("token_rows", owner)
        self.places = owner.places

    @torch.no_grad()
    def derive(self) -> None:
        if self.token_rows is not None and "token_rows" in self.specs:
            self.token_rows.zero_()
            self.token_rows[: len(self.places)].copy_(self.weight[list(self.places)])

    def lookup(self, device: torch.device) -> Tensor:
        """Return `places` on a device, int64 [M], padded with a row number that does not exist."""
        if self._lookup is None or self._lookup.device != device:
            assert self.token_rows is not None
            padding = self.token_rows.shape[0] - len(self.places)
            self._lookup = torch.tensor([*self.places, *[self.weight.shape[0]] * padding], device=device)
        return self._lookup

    def rows_of(self, local_N: Tensor) -> Tensor:
        """Return the rows [N, D] of tokens whose numbers count from this rank's first row."""
        y_ND = functional.embedding(local_N, self.weight)
        if self.token_rows is None:
            return y_ND
        lookup_M = self.lookup(local_N.device)
        row_N = torch.searchsorted(lookup_M, local_N).clamp_(max=lookup_M.numel() - 1)
        has_own_N = lookup_M[row_N] == local_N
        own_ND = functional.embedding(row_N, self.token_rows.to(y_ND.dtype))
        return torch.where(has_own_N.unsqueeze(-1), own_ND, y_ND)
