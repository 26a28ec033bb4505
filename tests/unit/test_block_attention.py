"""Attention by blocks beside torch's own, in fp64: outputs and gradients, all of its shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel import block_attention as module
from parallel.block_attention import block_attention
from parallel.documents import Span

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # fp64, sums in another order


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks small, so that small tensors have many of them and a rest."""
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "LONG_BLOCK", 6)
    monkeypatch.setattr(module, "LONG", 16)


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v as layers have them, heads behind tokens, and a gradient of the output."""
    stream = torch.Generator().manual_seed(0)
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    return [torch.randn(batch, n, h, 8, generator=stream, dtype=torch.float64).to(dtype).transpose(1, 2) for n, h in shapes]


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_blocks(q: Tensor, k: Tensor, v: Tensor, **reach) -> Tensor:
    """Attend in one document that fills all rows; heads before tokens, as torch has them."""
    span = Span(slice(0, q.shape[0]), slice(0, q.shape[2]), slice(0, k.shape[2]))
    return block_attention(*(x.transpose(1, 2) for x in (q, k, v)), [span], **reach).transpose(1, 2)


def torchs_own(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor:
    ages = torch.arange(q.shape[2]).unsqueeze(1) - torch.arange(k.shape[2])
    mask = (ages >= 0) & (ages < (window or len(ages))) if causal else None
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 7, 16])
@pytest.mark.parametrize("length", [1, 4, 11, 19])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_causal_attention_is_torchs(heads: tuple[int, int], length: int, window: int | None, scale: float | None) -> None:
    given = tensors(2, *heads, length, length, torch.float64)
    ours = with_gradients(lambda q, k, v: by_blocks(q, k, v, causal=True, window=window, scale=scale), *given)
    for mine, theirs in zip(ours, with_gradients(lambda *qkv: torchs_own(*qkv, True, window, scale), *given), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (7, 7), (9, 20), (20, 3)])
def test_attention_to_another_side_is_torchs(queries: int, keys: int) -> None:
    given = tensors(2, 4, 2, queries, keys, torch.float64)
    ours = with_gradients(lambda q, k, v: by_blocks(q, k, v, causal=False), *given)
    for mine, theirs in zip(ours, with_gradients(lambda *qkv: torchs_own(*qkv, False, None, None), *given), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_one_matrix_at_a_time_by_onednn(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    calls = []
    by_onednn = module.by_onednn
    monkeypatch.setattr(module, "_alone", lambda *given: True)
    monkeypatch.setattr(module, "by_onednn", lambda *given: calls.append(given) or by_onednn(*given))
    given = tensors(2, *heads, 19, 19, torch.float32)
    ours = with_gradients(lambda q, k, v: by_blocks(q, k, v, causal=True, window=window), *given)
    assert calls
    for mine, theirs in zip(ours, with_gradients(lambda *qkv: torchs_own(*qkv, True, window, None), *given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # fp32 sums of at most 19 · 8 terms


def test_bf16_is_as_close_to_fp64_as_torchs_own() -> None:
    given = tensors(2, 4, 2, 19, 19, torch.bfloat16)
    exact = with_gradients(lambda *qkv: torchs_own(*qkv, True, None, None), *(x.double() for x in given))
    ours = with_gradients(lambda q, k, v: by_blocks(q, k, v, causal=True), *given)
    theirs = with_gradients(lambda *qkv: torchs_own(*qkv, True, None, None), *given)
    for true, mine, other in zip(exact, ours, theirs, strict=True):
        # Logits are rounded to bf16 here, and stay fp32 in torch's kernel: half as far again.
        assert (mine.double() - true).norm() < 2.5 * (other.double() - true).norm()


def test_what_attention_keeps_is_queries_keys_and_values() -> None:
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 2, 2, 16, 16, torch.float64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        by_blocks(q, k, v, causal=True)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (q, k, v)}


def test_documents_are_computed_apart() -> None:
    q, k, v, grad = (x.transpose(1, 2) for x in tensors(3, 4, 2, 20, 20, torch.float64))
    every, first, last = slice(0, 2), slice(0, 7), slice(7, 20)
    spans = [Span(every, first, first), Span(every, last, last), Span(slice(2, 3), slice(0, 20), slice(0, 20))]
    together = with_gradients(lambda q, k, v: block_attention(q, k, v, spans, causal=True, window=9), q, k, v, grad)
    for span in spans:
        rows_queries, rows_keys = (span.rows, span.queries), (span.rows, span.keys)
        whole = [Span(slice(0, span.rows.stop - span.rows.start), *([slice(0, span.keys.stop - span.keys.start)] * 2))]
        parts = [x[rows_queries] for x in (q, k, v, grad)]
        alone = with_gradients(lambda q, k, v, whole=whole: block_attention(q, k, v, whole, causal=True, window=9), *parts)
        for all_of_it, part, place in zip(together, alone, (rows_queries, rows_queries, rows_keys, rows_keys), strict=True):
            assert torch.equal(all_of_it[place], part)


def test_a_document_without_keys_gets_nothing_and_gives_nothing() -> None:
    q, k, v, grad = (x.transpose(1, 2) for x in tensors(1, 2, 2, 10, 6, torch.float64))
    spans = [Span(slice(0, 1), slice(0, 4), slice(0, 5)), Span(slice(0, 1), slice(4, 10), slice(0, 0))]
    out, dq, dk, dv = with_gradients(lambda q, k, v: block_attention(q, k, v, spans, causal=False), q, k, v, grad)
    assert not out[:, 4:].any()
    assert not dq[:, 4:].any()
    assert not dk[:, 5:].any()
    assert not dv[:, 5:].any()
    assert out[:, :4].all()
    assert dk[:, :5].all()
