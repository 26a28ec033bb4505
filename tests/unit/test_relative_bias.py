"""The buckets of distances against transformers', distance by distance, and how a bias of distances is laid out by places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel import attention
from parallel.attention import attend
from parallel.documents import Documents
from parallel.relative_bias import buckets_of_distances, by_place
from tests.unit.oracle import assert_close

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (4, 3), (11, 13), (64, 1000), (33, 257)])
def test_a_distance_is_in_the_bucket_that_transformers_puts_it_in(buckets: int, furthest: int, causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    length = 700
    expected = T5Attention._relative_position_bucket(
        torch.arange(1 - length, length), bidirectional=not causal, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(buckets_of_distances(length, buckets, furthest, causal, CPU), expected)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("queries", "keys"), [(range(7), range(7)), (range(2, 5), range(5)), (range(3, 7), range(1, 7))])
def test_each_place_has_the_bias_of_its_distance(queries: range, keys: range) -> None:
    bias_HX = random(2, 13)  # of distances −6 to 6
    got = by_place(bias_HX, queries, keys)
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            assert torch.equal(got[:, row, column], bias_HX[:, key - query + 6])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("share_calls", [False, True])
def test_blocks_of_queries_and_shared_calls_change_nothing(
    causal: bool, share_calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax over each document alone: rows of many documents, and of one that is cut into blocks."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    documents = Documents(((3, 2, 1, 4), (2, 2, 2, 4)) if share_calls else ((10,), (7, 3)))
    q, k, v = random(3, 2, 10, 4, 6)
    bias_HX = random(4, 19).requires_grad_()
    got = attend(q, k, v, documents, causal=causal, scale=1.0, bias_HX=bias_HX, share_calls=share_calls)
    expected = torch.zeros_like(got)
    for row, lengths in enumerate(documents.lengths):
        first = 0
        for length in lengths:
            span = slice(first, first + length)
            logits = torch.einsum("shk,thk->hst", q[row, span], k[row, span]) + by_place(bias_HX, range(length), range(length))
            if causal:
                logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            expected[row, span] = torch.einsum("hst,thk->shk", logits.softmax(-1), v[row, span])
            first += length
    assert_close(got, expected, 1e-12, "attention")
    (ours,), (theirs,) = (torch.autograd.grad((part * part).sum(), bias_HX, retain_graph=True) for part in (got, expected))
    assert_close(ours, theirs, 1e-12, "gradient of the bias")
