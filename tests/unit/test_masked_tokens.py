"""Masking for data.task mlm: which tokens, how many of each kind, and that nothing but names decides it."""

from __future__ import annotations

import numpy as np

from trainer.data.rows import Row
from trainer.data.targets import MaskedTokens, targets_of
from trainer.data.tokenizer import make_tokenizer
from trainer.sections import Data

SIZE, END, MASK = 20_000, 256, 257


def masked(seed: int = 0, part: str = "training") -> MaskedTokens:
    tokenizer = make_tokenizer("bytes").for_masking()
    assert (tokenizer.mask, tokenizer.vocab_size) == (MASK, 258)
    targets = targets_of(Data(task="mlm"), tokenizer, causal=False, seed=seed, part=part)
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
