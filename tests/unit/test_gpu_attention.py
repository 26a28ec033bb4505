"""Attention of packed documents in one call, as GPUs have it, beside a call for each document.

FlexAttention runs forward on CPUs too; the kernels for sequences of any length only on GPUs.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention import attend
from parallel.documents import Documents
from parallel.gpu_attention import boundaries, flex_attention, suits_varlen

H, G, K = 4, 2, 32
PACKED = Documents(((40, 24), (64,), (1, 30, 33)))
SOURCES = Documents(((10, 54), (64,), (20, 44)))  # the last target has no source
HALF = {"rtol": 2e-2, "atol": 2e-2}  # bf16 on values of size 1: 2⁻⁸, and sums of up to 64 terms


def inputs(dtype: torch.dtype, device: str) -> list[Tensor]:
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(3, 64, heads, K, generator=stream).to(device, dtype).requires_grad_() for heads in (H, G, G)]


def test_boundaries_of_documents_laid_one_after_another() -> None:
    assert boundaries(((3, 2), (5,)), ((3, 2), (5,))) == ([0, 3, 5, 10], [0, 3, 5, 10])


def test_a_document_without_keys_begins_where_it_ends() -> None:
    assert boundaries(((2, 3), (4, 1)), ((5,), (2, 3))) == ([0, 2, 5, 9, 10], [0, 5, 5, 7, 10])


def test_only_gpus_take_all_documents_in_one_call() -> None:
    assert not suits_varlen(inputs(torch.bfloat16, "cpu")[0], PACKED.lengths, PACKED.lengths, None)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_is_attention_by_document(softcap: float | None, window: int | None) -> None:
    given = [x.detach() for x in inputs(torch.float32, "cpu")]
    numbers = PACKED.numbers_BS, PACKED.numbers_BS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, it is slow
        ours = flex_attention(*given, numbers, causal=True, window=window, scale=0.3, softcap=softcap)
    theirs = attend(*given, PACKED, causal=True, window=window, scale=0.3, softcap=softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32, 64 terms in another order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("reach", "sources"),
    [
        ({"causal": True}, None),
        ({"causal": True, "window": 7, "scale": 0.3}, None),
        ({"causal": False}, SOURCES),
        ({"causal": True, "softcap": 5.0}, None),
        ({"causal": True, "softcap": 5.0, "window": 7}, None),
    ],
)
def test_one_call_on_a_gpu_has_the_numbers_and_gradients_of_a_call_for_each(
    monkeypatch: pytest.MonkeyPatch, reach: dict[str, Any], sources: Documents | None
) -> None:
    given, grad = inputs(torch.bfloat16, "cuda"), torch.randn(3, 64, H, K, device="cuda", dtype=torch.bfloat16)

    def results() -> list[Tensor]:
        out = attend(*given, PACKED, sources=sources, **reach)
        return [out.detach(), *torch.autograd.grad(out, given, grad)]

    together = results()
    monkeypatch.setattr("parallel.attention.suits_varlen", lambda *given: False)
    monkeypatch.setattr("parallel.attention.suits_flex", lambda *given: False)
    for one, each in zip(together, results(), strict=True):
        torch.testing.assert_close(one, each, **HALF)
