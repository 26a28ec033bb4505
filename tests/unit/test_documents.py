"""Packed documents: where they lie, and attention that stays inside them, against one call with an explicit mask."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.attention import attend
from parallel.documents import Documents

H, G, K = 4, 2, 6


@st.composite
def packings(draw: st.DrawFn) -> Documents:
    """Up to 4 rows of up to 12 tokens, cut at random; neighbours often alike, as in a batch without boundaries."""
    seq_len = draw(st.integers(1, 12))
    rows: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, 4))):
        if rows and draw(st.booleans()):
            rows.append(rows[-1])
            continue
        cuts = sorted({0, seq_len, *draw(st.lists(st.integers(1, max(1, seq_len - 1)), max_size=4))} & set(range(seq_len + 1)))
        rows.append(tuple(b - a for a, b in itertools.pairwise(cuts)))
    return Documents(tuple(rows))


def document_of_each_token(documents: Documents) -> Tensor:
    """Number of its document in its row, int64 [B, S]."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents.lengths])


@given(packings())
def test_positions_restart_in_each_document(documents: Documents) -> None:
    expected = [[place for length in row for place in range(length)] for row in documents.lengths]
    assert documents.positions_BS.tolist() == expected
    assert documents.positions_BS.dtype == torch.int64


@given(packings())
def test_spans_cover_every_token_once_and_join_all_equal_neighbours(documents: Documents) -> None:
    rows, seq_len = len(documents.lengths), sum(documents.lengths[0])
    seen = torch.zeros(rows, seq_len, dtype=torch.int64)
    spans = documents.spans(documents)
    for span in spans:
        assert span.queries == span.keys
        seen[span.rows, span.queries] += 1
        for row in documents.lengths[span.rows]:
            assert span.queries.stop - span.queries.start in row
    assert (seen == 1).all()
    assert len(spans) == sum(len(row) for row, _ in itertools.groupby(documents.lengths))


def test_whole_rows_are_one_document_each() -> None:
    documents = Documents.whole_rows(3, 5)
    assert documents.lengths == ((5,), (5,), (5,))
    assert documents.spans(documents) == [(slice(0, 3), slice(0, 5), slice(0, 5))]


def masked_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents: Documents, *, causal: bool) -> Tensor:
    """softmax(Q Kᵀ / √K + mask) V with the mask written out; key/value heads repeated for their query heads."""
    k_BSHK, v_BSHK = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k_BSGK, v_BSGK))
    of_token = document_of_each_token(documents)
    allowed_BSS = of_token[:, :, None] == of_token[:, None, :]
    if causal:
        allowed_BSS = allowed_BSS.tril()
    scores = torch.einsum("bshk,bthk->bhst", q_BSHK, k_BSHK) / math.sqrt(K)
    weights = scores.masked_fill(~allowed_BSS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthk->bshk", weights, v_BSHK)


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("kv_heads", [G, H])
@pytest.mark.parametrize("causal", [True, False])
@given(documents=packings(), seed=st.integers(0, 2**31))
def test_attention_equals_one_call_with_a_mask(
    documents: Documents, seed: int, causal: bool, kv_heads: int, by_blocks: bool
) -> None:
    shape = (len(documents.lengths), sum(documents.lengths[0]))
    stream = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(*shape, heads, K, dtype=torch.float64, generator=stream) for heads in (H, kv_heads, kv_heads)]
    upstream = torch.randn(*shape, H, K, dtype=torch.float64, generator=stream)
    results = []
    for attention in (attend, masked_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in qkv]
        with patch("parallel.attention.suits_blocks", return_value=by_blocks):
            out = attention(*inputs, documents, causal=causal)
        out.backward(upstream)
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
