"""The sample for (seed, step, index) is arithmetic: bijective, exactly once per epoch, proportional, however it is asked."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sampling import (
    BLOCK_SAMPLES,
    PERIOD_BLOCKS,
    Blend,
    Pool,
    apportion,
    held_out_windows,
    num_windows,
    permute,
    stream_key,
)

KEYS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_permute_of_huge_sizes_stays_inside_and_keeps_apart(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    places = permute(np.array(indices), size, key).tolist()
    assert len(set(places)) == len(indices)
    assert all(0 <= place < size for place in places)
    assert [int(permute(index, size, key)) for index in indices] == places


def test_permute_shuffles_evenly() -> None:
    """Over keys, each index goes to each place about equally often: chi-square of a 7 × 7 table, 36 degrees of freedom."""
    trials = 2000
    table = np.zeros((7, 7))
    for key in range(trials):
        table[np.arange(7), permute(np.arange(7), 7, key)] += 1
    expected = trials / 7
    assert ((table - expected) ** 2 / expected).sum() < 75  # exceeded by chance once in 10^4
    distances = np.abs(permute(np.arange(10_000), 10_000, 1) - np.arange(10_000))
    assert distances.mean() == pytest.approx(10_000 / 3, rel=0.05)


def test_streams_of_other_names_differ() -> None:
    keys = [stream_key(0, "epoch", 1), stream_key(1, "epoch", 1), stream_key(0, "epoch", 2), stream_key(0, "epoc", "h1")]
    assert len(set(keys)) == 4
    assert keys[0] == stream_key(0, "epoch", 1) < 2**64


@given(total=st.integers(0, 10**9), weights=WEIGHTS)
def test_apportion_is_exact_and_within_one(total: int, weights: list[float]) -> None:
    counts = apportion(total, weights)
    whole = sum(map(Fraction, weights))
    assert sum(counts) == total
    assert all(abs(count - total * Fraction(weight) / whole) < 1 for count, weight in zip(counts, weights, strict=True))


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 99), block=st.integers(0, 3 * PERIOD_BLOCKS))
def test_every_block_has_its_proportions(weights: list[float], seed: int, block: int) -> None:
    blend = Blend(weights, [1000] * len(weights), seed)
    sources, _ = blend.locate(np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES))
    counts = np.bincount(sources, minlength=len(weights))
    ideal = BLOCK_SAMPLES * np.array(weights) / sum(weights)
    assert np.abs(counts - ideal).max() < 1 + 1e-9


def test_small_weights_are_exact_in_the_long_run() -> None:
    period = PERIOD_BLOCKS * BLOCK_SAMPLES
    blend = Blend([1.0, 1e-4, 1e-12], [10**9] * 3, seed=0)
    sources, _ = blend.locate(np.arange(period))
    assert np.bincount(sources).tolist() == [period - 105 - 1, 105, 1]
    gaps = np.diff(np.flatnonzero(sources == 1))
    assert gaps.max() < 3 * period / 105  # spread over the period, not bunched


@settings(max_examples=12, deadline=None)
@given(sources=st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(1, 300)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_each_source_gives_every_sample_once_per_epoch(sources: list[tuple[float, int]], seed: int) -> None:
    weights, sizes = zip(*sources, strict=True)
    chosen, samples = Blend(weights, sizes, seed).locate(np.arange(3000))
    for source, size in enumerate(sizes):
        mine = samples[chosen == source]
        epochs = [mine[begin : begin + size].tolist() for begin in range(0, len(mine), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        if size > 20 and len(epochs) > 2:
            assert epochs[0] != epochs[1]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_by_size_an_epoch_has_each_sample_of_each_source_once(sizes: list[int], seed: int) -> None:
    order, size = Pool(sizes, seed), sum(sizes)
    epochs = [list(zip(*map(list, order.locate(np.arange(n * size, (n + 1) * size))), strict=True)) for n in range(3)]
    everything = [(source, sample) for source, count in enumerate(sizes) for sample in range(count)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert order.shares == pytest.approx([count / size for count in sizes])
    if size > 20:
        assert epochs[0] != epochs[1] != everything
    late = np.arange(10**12, 10**12 + 50)
    sources, samples = order.locate(late)
    assert [tuple(map(int, order.locate(n))) for n in late] == list(zip(sources.tolist(), samples.tolist(), strict=True))


def test_by_size_the_sources_are_mixed_all_along() -> None:
    """600 and 20 samples: each hundred has about 3 of the small one (hypergeometric: 12 or more once in 10^5)."""
    sources, _ = Pool([600, 20], seed=0).locate(np.arange(620))
    counts = [int((sources[begin : begin + 100] == 1).sum()) for begin in range(0, 600, 100)]
    assert max(counts) < 12
    assert sum(count > 0 for count in counts) >= 4


def test_shares_of_a_blend() -> None:
    assert Blend([3.0, 1.0], [5, 500], seed=0).shares == (0.75, 0.25)


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 10**9), cuts=st.lists(st.integers(0, 3000), max_size=5), seed=st.integers(0, 9))
def test_the_answer_does_not_depend_on_how_it_is_asked(start: int, cuts: list[int], seed: int) -> None:
    blend = Blend([2.0, 1.0], [70, 10**7], seed)
    wanted = np.arange(start, start + 3000)
    whole = np.stack(blend.locate(wanted))
    edges = sorted({0, 3000, *cuts})
    parts = [np.stack(Blend([2.0, 1.0], [70, 10**7], seed).locate(wanted[a:b])) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    order = np.random.default_rng(seed).permutation(3000)
    assert np.array_equal(np.stack(blend.locate(wanted[order])), whole[:, order])


def test_other_seeds_give_other_orders() -> None:
    orders = {tuple(Blend([1.0], [1000], seed).locate(np.arange(50))[1].tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_a_late_step_of_a_huge_index_is_instant() -> None:
    """Step 10^6 of 8 sequences, among 10^8 samples: 2 s and 500 MB would be too much by far."""
    tracemalloc.start()
    began = time.perf_counter()
    Blend([3.0, 1.0], [10**8, 10**8], seed=0).locate(np.arange(8 * 10**6, 8 * 10**6 + 8))
    elapsed_s = time.perf_counter() - began
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed_s < 1.0
    assert peak_bytes < 5e6


@pytest.mark.parametrize(("weights", "sizes"), [([], []), ([1.0], [0]), ([0.0], [5]), ([1.0, 1.0], [5])])
def test_impossible_blends(weights: list[float], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="each source needs a positive weight and a sample"):
        Blend(weights, sizes, seed=0)


def test_windows() -> None:
    tokens = (0, 1, 2, 4, 5, 6, 8, 9)
    assert [num_windows(count, 4, tails=False) for count in tokens] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert [num_windows(count, 4, tails=True) for count in tokens] == [0, 0, 1, 1, 1, 2, 2, 2]
    everything = held_out_windows([9, 2, 6], 4, 100)
    assert [(window.store, window.begin) for window in everything] == [(0, 0), (0, 4), (1, 0), (2, 0), (2, 4)]
    some = Counter(window.store for window in held_out_windows([401, 41, 2], 4, 12))
    assert some == {0: 11, 1: 1}
