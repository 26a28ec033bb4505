"""Masking for data.task mlm: which tokens, how many of each kind, and that nothing but names decides it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.unit.stores import S, make_store
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.rows import Row
from trainer.data.targets import MaskedTokens, targets_of
from trainer.data.tokenizer_loading import make_tokenizer
from trainer.schema import Data

SIZE, END, MASK = 20_000, 256, 257


def masked(seed: int = 0, part: str = "training", **keys: float) -> MaskedTokens:
    tokenizer = make_tokenizer("bytes").for_masking()
    assert (tokenizer.mask, tokenizer.vocab_size) == (MASK, 258)
    targets = targets_of(Data(task="mlm", **keys), tokenizer, causal=False, seed=seed, part=part)
    assert isinstance(targets, MaskedTokens)
    return targets


def row() -> Row:
    tokens = np.random.default_rng(0).integers(0, 256, SIZE)
    tokens[::10] = END
    return Row(tokens, np.roll(tokens, -1), np.ones(SIZE, bool), (SIZE,))


def test_shares_labels_and_special_tokens() -> None:
    """18 000 tokens may be chosen; the bounds are 5 standard deviations of a count."""
    original, got = row(), masked().mark(row(), 7)
    chosen = got.is_target
    assert abs(chosen.sum() - 0.15 * 18_000) < 5 * (18_000 * 0.15 * 0.85) ** 0.5
    assert not chosen[original.tokens == END].any()
    np.testing.assert_array_equal(got.labels[chosen], original.tokens[chosen])
    np.testing.assert_array_equal(got.tokens[~chosen], original.tokens[~chosen])
    shown = got.tokens[chosen]
    is_mask, stays = shown == MASK, shown == original.tokens[chosen]
    for share, count in ((0.8, is_mask.sum()), (0.1, stays.sum()), (0.1, (~is_mask & ~stays).sum())):
        assert abs(count - share * chosen.sum()) < 5 * (chosen.sum() * share * (1 - share)) ** 0.5
    assert END not in shown


def test_only_seed_part_row_and_position_decide() -> None:
    first = masked().mark(row(), 7)
    again = masked().mark(row(), 7)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    for other in (masked(seed=1).mark(row(), 7), masked(part="evaluation").mark(row(), 7), masked().mark(row(), 8)):
        assert 0.1 < (first.is_target & other.is_target).sum() / first.is_target.sum() < 0.2, (
            "unrelated choices agree by chance"
        )
    half = row()
    short = Row(half.tokens[:50], half.labels[:50], half.is_target[:50], (50,))
    np.testing.assert_array_equal(masked().mark(short, 7).tokens, first.tokens[:50])


def test_the_share_is_that_of_the_recipe() -> None:
    chosen = masked(mask_fraction=0.4).mark(row(), 7).is_target
    assert abs(chosen.sum() - 0.4 * 18_000) < 5 * (18_000 * 0.4 * 0.6) ** 0.5


def labels_of(batches: list[MicroBatch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch.labels_BS]


def test_each_row_of_a_run_is_masked_anew_and_alike_in_every_layout(tmp_path: Path) -> None:
    """A store of one row, so that each row is another epoch of it; an evaluation of it eight times over."""
    store = make_store(tmp_path / "store", [8 * S + 1])
    targets = MaskedTokens(0.5, mask=998, ordinary=np.arange(900), stream=0, never_none=False)
    keys = {"row_tokens": 8 * S, "isolate_documents": True, "targets": targets}
    data = TrainData([store], [1.0], seed=0, global_sequences=4, **keys)
    assert data.num_samples == 1
    held_out = EvalData([store] * 8, sequences=8, **keys)
    alone, divided = (
        [
            *(data.micro_batches(step, dp_rank=rank, dp=dp, micro_sequences=1) for step in range(3) for rank in range(dp)),
            *(held_out.micro_batches(dp_rank=rank, dp=dp, micro_sequences=1) for rank in range(dp)),
        ]
        for dp in (1, 2)
    )
    rows, again = ([row for batches in way for row in labels_of(list(batches))] for way in (alone, divided))
    assert rows == again
    assert len(set(rows[:12])) == 12
    assert len(set(rows[12:])) == 8


def test_a_short_row_has_something_to_guess(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [3, 2, 2])
    keys = {"row_tokens": S, "isolate_documents": False, "weights": None, "seed": 0, "global_sequences": 1}
    mark = {"fraction": 0.01, "mask": 998, "ordinary": np.arange(900), "stream": 0}
    counts = {
        never_none: {
            batch.num_targets
            for step in range(100)
            for batch in TrainData([store], **keys, targets=MaskedTokens(**mark, never_none=never_none)).micro_batches(
                step, dp_rank=0, dp=1, micro_sequences=1
            )
        }
        for never_none in (True, False)
    }
    assert counts[False] >= {0, 1}
    assert min(counts[True]) == 1
