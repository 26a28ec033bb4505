"""Random numbers by name: dropout masks that do not depend on the layout.

A mask is a function of (seed, step, sequence, site, place in the logical tensor). Ranks that hold the same activation draw
the same mask; ranks that hold different tokens or heads draw those of their tokens or heads; recompute draws it again; and a
checkpoint has no generator's state to keep, because the names are the state.

Shape letters: B rows of a micro-batch, S sequence, N = B · S tokens, D model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*names: object) -> int:
    """A 63-bit seed for the random stream of this name, such as (seed, "weights", tensor name)."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(device: torch.device, *names: object) -> torch.Generator:
    """A generator at the start of the stream of this name."""
    return torch.Generator(device).manual_seed(derive_seed(*names))


@dataclass(frozen=True)
class Streams:
    """The random streams of a micro-batch: one seed for each of its B sequences."""

    seeds: tuple[int, ...]

    @classmethod
    def of_step(cls, seed: int, step: int, sequences: range) -> Streams:
        """Those of a run's step; `sequences` are the micro-batch's places in it, over all ranks."""
        return cls(tuple(derive_seed(seed, "dropout", step, sequence) for sequence in sequences))

    def keeps_features(self, site: str, rate: float, shape: tuple[int, int], tokens: slice, device: torch.device) -> Tensor:
        """Bool: which features of `tokens` survive; `shape` = (S, D) of a whole sequence, `tokens` within the N.

        A sequence is drawn whole and cut, so a rank draws at most one more than it needs at either end.
        """
        seq_len, features = shape
        first, last = tokens.start // seq_len, -(-tokens.stop // seq_len)
        drawn = torch.cat([self._keeps(site, rate, row, (seq_len, features), device) for row in range(first, last)])
        return drawn[tokens.start - first * seq_len : tokens.stop - first * seq_len]

    def keeps_weights(
        self, site: str, rate: float, rows: range, heads: range, block: tuple[int, int], start: int, device: torch.device
    ) -> Tensor:
        """Bool [rows, heads, *block]: which attention weights survive, for the block of queries that begins at `start`."""
        drawn = [self._keeps((site, head, start), rate, row, block, device) for row in rows for head in heads]
        return torch.stack(drawn).view(len(rows), len(heads), *block)

    def _keeps(self, site: object, rate: float, row: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        return torch.rand(shape, generator=stream(device, self.seeds[row], site), device=device) >= rate


def dropout(x: Tensor, keeps: Tensor, rate: float) -> Tensor:
    """x where kept, divided by the share that is kept; 0 elsewhere, also where x is not finite."""
    return x.masked_fill(~keeps, 0.0) / (1.0 - rate)
