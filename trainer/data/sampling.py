"""The arithmetic of which tokens make which sample: O(1) in memory and time, and the same however
it is asked.

    permute     a keyed bijection on range(size): a shuffled order that is computed, never stored
    Order       global sample number → (source, sample of that source): `Blend` by weights, `Pool`
                by size
    windows     a store's token stream cut to fixed length

So the sample for (seed, step, index) needs no state, no layout and no history: resuming at step
10^6 of 10^8 samples is the evaluation of a formula.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

ROUNDS = 8
BLOCK_SAMPLES = 1024  # weighted proportions are exact to one sample within each block,
PERIOD_BLOCKS = 1024  # and to one sample in 2^20 over this many blocks; a power of two


def stream_key(seed: int, *names: str | int) -> int:
    """Return the 64-bit key of the random stream that a seed and names select. Streams of different
    names are unrelated."""
    text = "\x1f".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int | npt.ArrayLike, size: int, key: int) -> Int64s:
    """Return where a keyed bijection on range(size) sends each index; int64, shaped like `index`.
    Requires 1 <= size <= 2^62.

    A Feistel network on pairs (left, right) below side = ceil(sqrt(size)), walked until it lands
    below size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). side^2 exceeds
    size by less than 2 side, so walks are short.
    """
    result = np.array(index, dtype=np.uint64)
    walking = np.ones(result.shape, dtype=bool)
    while walking.any():
        result[walking] = _feistel(result[walking], size, key)
        walking = result >= size
    return result.astype(np.int64)


def uniform(count: int, key: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1), float64 [count]. The i-th depends on the key and i alone."""
    # SplitMix64's increment.
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(np.uint64(key) + steps) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def _feistel(value: npt.NDArray[np.uint64], size: int, key: int) -> npt.NDArray[np.uint64]:
    side = np.uint64(isqrt(size - 1) + 1)
    left, right = value // side, value % side
    for round_key in _round_keys(key):
        left, right = right, (left + _mix(right ^ round_key) % side) % side
    return left * side + right


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(stream_key(key, "round", number)) for number in range(ROUNDS))


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every
    output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Return `total` divided in proportion to the weights by largest remainder: each within 1 of
    its ideal, with an exact sum."""
    shares = [Fraction(weight) for weight in weights]
    ideal = [total * share / sum(shares) for share in shares]
    counts = [int(share) for share in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - ideal[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class Order(Protocol):
    """An endless order of samples: which sample of which source is the n-th of a run."""

    sizes: tuple[int, ...]  # of the sources [samples]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of all samples that each source has; they sum to 1."""

    def locate(self, samples: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return the source and the sample in it, int64 [samples] each, of global samples
        [samples]."""


def order_of(weights: Sequence[float] | None, sizes: Sequence[int], seed: int) -> Order:
    """Return the order of samples; by size if `weights` is None. ValueError if a source has no
    sample or no positive weight."""
    return Pool(sizes, seed) if weights is None else Blend(weights, sizes, seed)


class Pool:
    """An order of all samples of all sources, shuffled together, then again in another order.

    In an epoch each sample is taken once, so a source's share of the epoch is exactly that of its
    samples.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"each source needs a sample: sizes {sizes}")
        self.sizes = tuple(sizes)
        self._seed = seed
        self._begins = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        self._size = sum(sizes)

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(size / self._size for size in self.sizes)

    def locate(self, samples: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self._size)
        pooled = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            pooled[here] = permute(places[here], self._size, stream_key(self._seed, "pool", int(epoch)))
        sources = np.searchsorted(self._begins, pooled, side="right").astype(np.int64) - 1
        return sources, pooled - self._begins[sources]


class Blend:
    """A map from global sample number to (source, sample of that source), for sources of given
    weights and sizes [samples].

    In every block of 1024 samples each source has its share, within one sample, in shuffled order.
    Over 1024 blocks its share is exact to one sample in 2^20 (a smaller one is rounded up to that).
    Each source walks through its own epochs: its first `size` samples are each of its samples once,
    in shuffled order, then again in another.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int) -> None:
        if len(weights) != len(sizes) or not weights or min(weights) <= 0 or min(sizes) < 1:
            raise ValueError(f"each source needs a positive weight and a sample: weights {weights}, sizes {sizes}")
        self.sizes = tuple(sizes)
        self._seed = seed
        self._counts = _block_counts(weights)
        self._before = np.concatenate([np.zeros((1, len(sizes)), np.int64), np.cumsum(self._counts, axis=0)])

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple((self._before[-1] / (PERIOD_BLOCKS * BLOCK_SAMPLES)).tolist())

    def locate(self, samples: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        samples = np.asarray(samples, dtype=np.int64)
        sources, draws = np.empty_like(samples), np.empty_like(samples)
        blocks, places = np.divmod(samples, BLOCK_SAMPLES)
        for block in np.unique(blocks):
            here = blocks == block
            block_sources, block_draws = self._block(int(block))
            sources[here], draws[here] = block_sources[places[here]], block_draws[places[here]]
        return sources, self._walk(sources, draws)

    def _block(self, block: int) -> tuple[Int64s, Int64s]:
        """Return, for each place in a block, its source and the number of that source's samples
        before it."""
        period, row = divmod(block, PERIOD_BLOCKS)
        in_order = np.repeat(np.arange(len(self.sizes)), self._counts[row])
        sources = in_order[permute(np.arange(BLOCK_SAMPLES), BLOCK_SAMPLES, stream_key(self._seed, "blend", block))]
        draws = np.empty(BLOCK_SAMPLES, np.int64)
        before = period * self._before[-1] + self._before[row]
        for source, count in enumerate(self._counts[row]):
            draws[sources == source] = before[source] + np.arange(count)
        return sources, draws

    def _walk(self, sources: Int64s, draws: Int64s) -> Int64s:
        """Return the sample that each draw of a source takes: the source's epochs one after
        another, each permuted anew."""
        samples = np.empty_like(draws)
        for source, size in enumerate(self.sizes):
            epochs, places = np.divmod(draws, size)
            for epoch in np.unique(epochs[sources == source]):
                here = (sources == source) & (epochs == epoch)
                samples[here] = permute(places[here], size, stream_key(self._seed, "epoch", source, int(epoch)))
        return samples


def _block_counts(weights: Sequence[float]) -> Int64s:
    """Return the samples of each source in each block of a period, int64 [PERIOD_BLOCKS, sources].
    Rows sum to BLOCK_SAMPLES.

    The period is apportioned first, so that small weights are exact in the long run. What a source
    has beyond a whole number per block is handed out one to a block, source after source around the
    period. Blocks are taken in bit-reversed order, which spreads a source's extra samples evenly.
    """
    totals = np.array(apportion(PERIOD_BLOCKS * BLOCK_SAMPLES, weights))
    totals[np.argmax(totals)] -= np.sum(totals == 0)
    totals[totals == 0] = 1
    counts = np.tile(totals // PERIOD_BLOCKS, (PERIOD_BLOCKS, 1))
    extra_source = np.repeat(np.arange(len(totals)), totals % PERIOD_BLOCKS)
    np.add.at(counts, (_bit_reversed()[np.arange(len(extra_source)) % PERIOD_BLOCKS], extra_source), 1)
    return counts


def _bit_reversed() -> Int64s:
    bits = PERIOD_BLOCKS.bit_length() - 1
    numbers = np.arange(PERIOD_BLOCKS)
    reversed_: Int64s = np.sum([((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)], axis=0)
    return reversed_


@dataclass(frozen=True)
class Window:
    """A sample: tokens [begin, begin + row_tokens) of a store, each of which predicts the next one.

    It ends earlier if the store does.
    """

    store: int
    begin: int


def num_windows(num_tokens: int, row_tokens: int, *, tails: bool) -> int:
    """Return the number of samples in a stream.

    Sample j covers tokens [j row_tokens, (j + 1) row_tokens], so neighbours share one token. With
    `tails` the last sample counts too if the end of the stream cuts it short.
    """
    whole, rest = divmod(max(0, num_tokens - 1), row_tokens)
    return whole + (tails and rest > 0)


def held_out_windows(num_tokens: Sequence[int], row_tokens: int, limit: int) -> list[Window]:
    """Return at most `limit` windows over held-out stores, the last of each store perhaps cut
    short.

    Every store gives windows in proportion to its tokens, from its beginning, in order.
    """
    available = [num_windows(count, row_tokens, tails=True) for count in num_tokens]
    taken = available if sum(available) <= limit else apportion(limit, available)
    return [Window(store, j * row_tokens) for store, count in enumerate(taken) for j in range(count)]
