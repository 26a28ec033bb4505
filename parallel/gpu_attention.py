"""Attention of all packed documents in one call on GPUs.

Shape letters: B batch, S queries, T keys, N = B · S tokens, H query heads, G key/value heads, K
head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

Lengths = tuple[tuple[int, ...], ...]  # of the documents in each row
HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # of FlashAttention's kernels
MASKS = 8  # that are kept: one for each window of the layers of a micro-batch


def suits_varlen(q_BSHK: Tensor, queries: Lengths, keys: Lengths, window: int | None) -> bool:
    """Return whether one call for sequences of any length serves these documents.

    Rows that are one document each, without a window, are served as well by a call that is not
    told lengths. Each document must have its keys, or be the last of a row.
    """
    packed = window is not None or len(set(queries)) > 1 or len(queries[0]) > 1
    paired = all(len(ours) >= len(theirs) for ours, theirs in zip(queries, keys, strict=True))
    return q_BSHK.is_cuda and q_BSHK.dtype in HALF and q_BSHK.shape[-1] <= WIDEST_HEAD and packed and paired


def boundaries(queries: Lengths, keys: Lengths) -> tuple[list[int], list[int]]:
    """Return where each document's queries and keys begin in rows laid one after another, and the
    end. A document without keys has none between its beginning and its end."""
    of_keys = [(*theirs, *(0,) * (len(ours) - len(theirs))) for ours, theirs in zip(queries, keys, strict=True)]
    return tuple([0, *accumulate(chain(*rows))] for rows in (queries, of_keys))  # type: ignore[return-value]


@lru_cache(maxsize=MASKS)
def _boundaries_on(device: torch.device, queries: Lengths, keys: Lengths) -> tuple[Tensor, Tensor]:
    starts = boundaries(queries, keys)
    return tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in starts)  # type: ignore[return-value]


def varlen_attention(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    queries: Lengths,
    keys: Lengths,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(Q Kᵀ · scale) V inside each document, [B, S, H, K].

    By FlashAttention (Dao 2023, arXiv:2307.08691). One split of the keys: a document's result then
    does not hang on the others.
    """
    from torch.nn.attention.varlen import varlen_attn

    of_queries, of_keys = _boundaries_on(q_BSHK.device, queries, keys)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHK, k_BTGK, v_BTGK))
    reach = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    longest = max(map(max, queries)), max(map(max, keys))
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(*(q, k, v, of_queries, of_keys, *longest), scale=scale, window_size=reach, enable_gqa=gqa, num_splits=1)
    assert isinstance(out, Tensor)
    return out.view(q_BSHK.shape)


def suits_flex(q_BSHK: Tensor, softcap: float | None) -> bool:
    """Return whether FlexAttention can cap logits here: it is a kernel that triton compiles."""
    return q_BSHK.is_cuda and softcap is not None and has_triton()


def flex_attention(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    numbers: tuple[Tensor, Tensor],
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(cap(Q Kᵀ · scale)) V inside each document, [B, S, H, K].

    `numbers`: the number of each query's and of each key's document in its row, [B, S] and [B, T].
    Dong et al. 2024, arXiv:2412.05496.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    numbers = numbers[0].to(q.device), numbers[1].to(q.device)
    mask = _block_mask(numbers, causal, window)
    cap = None if softcap is None else _capping(softcap)
    call = _compiled() if q.is_cuda else _flex()
    out: Tensor = call(q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _block_mask(numbers: tuple[Tensor, Tensor], causal: bool, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    of_queries, of_keys = numbers

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        together = of_queries[row, query] == of_keys[row, key]
        if causal:
            together = together & (query >= key)
        return together if window is None else together & (query - key < window)

    (B, S), T = of_queries.shape, of_keys.shape[1]
    return create_block_mask(attends, B, None, S, T, device=str(of_queries.device))


@cache
def _capping(softcap: float) -> Callable[..., Tensor]:
    """Return the cap as FlexAttention takes it: one function, or it compiles anew."""

    def cap(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return flex


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flex(), dynamic=True)
