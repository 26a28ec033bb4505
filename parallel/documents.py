"""The documents in packed rows.

Shape letters: B batch, S queries, T keys, N = B · S tokens, H query heads, G key/value heads, K
head dim, R documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A document in consecutive rows: where its queries and its keys are in them."""

    rows: slice
    queries: slice
    keys: slice

    def of_queries(self, x_BSHK: Tensor) -> Tensor:
        """Return the part with its queries, by head: [B, H, S, K]."""
        return x_BSHK[self.rows, self.queries].transpose(1, 2)

    def of_keys(self, x_BTGK: Tensor) -> Tensor:
        return x_BTGK[self.rows, self.keys].transpose(1, 2)


@dataclass(frozen=True)
class Documents:
    """The boundaries of the documents in each packed row: for each row their lengths, which sum to
    S.

    They travel to every layer beside the tokens, because documents do not attend to each other and
    positions restart at 0 in each.
    """

    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def whole_rows(cls, rows: int, seq_len: int) -> Documents:
        return cls(((seq_len,),) * rows)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (B, S) of the rows."""
        return len(self.lengths), sum(self.lengths[0])

    @cached_property
    def positions_BS(self) -> Tensor:
        """The position of each token in its document, int64 [B, S]."""
        return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in self.lengths])

    def spans(self, keys: Documents) -> list[Span]:
        """Return, for each document, where it is in a run of rows with the same boundaries, and
        where its keys are: nowhere if it has none."""
        pairs = zip(self.lengths, keys.lengths, strict=True)
        spans = []
        for (ours, theirs), group in groupby(enumerate(pairs), key=lambda row: row[1]):
            rows = [index for index, _ in group]
            nothing = [slice(0, 0)] * (len(ours) - len(theirs))
            parts = zip(_spans(ours), _spans(theirs) + nothing, strict=False)
            spans += [Span(slice(rows[0], rows[-1] + 1), *part) for part in parts]
        return spans

    @cached_property
    def numbers_BS(self) -> Tensor:
        """The number, within its row, of the document each token is in, int64 [B, S]."""
        return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in self.lengths])

    def sums(self, values_N: Tensor) -> Tensor:
        """Return the sum of each document's values, [R], documents in the order of the rows."""
        lengths = [length for row in self.lengths for length in row]
        return torch.stack([part.sum() for part in values_N.split(lengths)])

    @cached_property
    def sides(self) -> tuple[Documents, Documents]:
        """The documents of the first and of the second half of each row, where rows hold sources
        and then their targets."""
        middle = self.shape[1] // 2
        cuts = [list(accumulate(row)).index(middle) + 1 for row in self.lengths]
        first = tuple(row[:cut] for row, cut in zip(self.lengths, cuts, strict=True))
        return Documents(first), Documents(tuple(row[cut:] for row, cut in zip(self.lengths, cuts, strict=True)))


def _spans(lengths: tuple[int, ...]) -> list[slice]:
    return [slice(end - n, end) for end, n in zip(accumulate(lengths), lengths, strict=True)]
