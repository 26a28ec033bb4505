"""Random numbers by name: dropout masks that do not depend on the layout.

A mask is a function of (seed, step, sequence, site, place in the logical tensor). Ranks that hold
the same activation draw the same mask; ranks that hold different tokens or heads draw the masks of
those; recompute draws the same mask again; and a checkpoint needs no generator state, because the
names are the state.

Shape letters: B rows of a micro-batch, S sequence, N = B · S tokens, D model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*names: object) -> int:
    """Return a 63-bit seed for the random stream of a name, such as (seed, "weights", tensor)."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(device: torch.device, *names: object) -> torch.Generator:
    """Return a generator at the start of the stream of this name."""
    return torch.Generator(device).manual_seed(derive_seed(*names))


@dataclass(frozen=True)
class Streams:
    """The random streams of a micro-batch: one seed for each of its B sequences."""

    seeds: tuple[int, ...]

    @classmethod
    def of_step(cls, seed: int, step: int, sequences: range) -> Streams:
        """Return the streams of a run's step. `sequences`: the micro-batch's numbers in the step,
        over all ranks."""
        return cls(tuple(derive_seed(seed, "dropout", step, sequence) for sequence in sequences))

    def keeps_features(self, site: str, rate: float, shape: tuple[int, int], tokens: slice, device: torch.device) -> Tensor:
        """Return which features of `tokens` survive, bool. `shape` is (S, D) of a whole sequence;
        `tokens` lies within the N.

        Sequences are drawn whole and then cut, so a rank draws at most one sequence more than it
        needs at either end.
        """
        seq_len, features = shape
        first, last = tokens.start // seq_len, -(-tokens.stop // seq_len)
        drawn = torch.cat([self._keeps(site, rate, row, (seq_len, features), device) for row in range(first, last)])
        return drawn[tokens.start - first * seq_len : tokens.stop - first * seq_len]

    def keeps_weights(
        self, site: str, rate: float, rows: range, heads: range, block: tuple[int, int], start: int, device: torch.device
    ) -> Tensor:
        """Return which attention weights survive, bool [rows, heads, *block], for the block of
        queries that begins at `start`."""
        drawn = [self._keeps((site, head, start), rate, row, block, device) for row in rows for head in heads]
        return torch.stack(drawn).view(len(rows), len(heads), *block)

    def _keeps(self, site: object, rate: float, row: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        return torch.rand(shape, generator=stream(device, self.seeds[row], site), device=device) >= rate


def dropout(x: Tensor, keeps: Tensor, rate: float) -> Tensor:
    """Return x / (1 − rate) where `keeps`, and 0 elsewhere, even where x is not finite."""
    return x.masked_fill(~keeps, 0.0) / (1.0 - rate)
