"""Tensor-parallel attention over packed documents: within each document, or from a target to its
source.

Shape letters: B batch, S sequence, N = B · S tokens, D model, H query heads, G key/value heads, K
head dim, X distances from a query to a key; a capital keeps its letter when it is local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from parallel.block_attention import block_attention, suits_blocks
from parallel.documents import Documents, Span
from parallel.gpu_attention import flex_attention, suits_flex, suits_varlen, varlen_attention
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import Group
from parallel.norm import QueryKeyNorm
from parallel.outputs import Output
from parallel.params import Init
from parallel.relative_bias import RelativeBias, by_place
from parallel.rng import Streams, dropout
from parallel.rotation import Rotate
from parallel.soft_cap import soft_cap
from parallel.tensor import TensorParallel

Rotation = tuple[Tensor, Tensor]
# Queries per call where a mask is needed, so that the mask and the logits stay small.
QUERY_BLOCK = 512
# Many short documents attend faster in one masked call for all rows than in a call for each: a call
# costs about 60 µs on a server CPU, as much as the attention weights of 6000 pairs of tokens at
# hidden size 256.
MANY, PAIRS_PER_CALL = 4, 6000


@dataclass(frozen=True, kw_only=True)
class WeightDropout:
    """A dropout of attention weights: its rate, the random streams it draws from, and the heads
    that this rank has."""

    rate: float
    streams: Streams
    site: str
    heads: range


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The rules by which a token attends to its document (see `attend`)."""

    causal: bool
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    bias_HX: Tensor | None = None
    dropout: WeightDropout | None = None

    @property
    def fused(self) -> bool:
        """Return whether a fused kernel supports all that is done to logits and weights."""
        return self.softcap is None and self.dropout is None


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    documents: Documents,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HX: Tensor | None = None,
    dropout: WeightDropout | None = None,
    sources: Documents | None = None,
    share_calls: bool = False,
) -> Tensor:
    """Return softmax(cap(Q Kᵀ · scale) + bias) V inside each document, [B, S, H, K].

    `sources`: the documents of the keys, where they are not those of the queries. Each document
    attends to the source with the same number in its row. One without a source, which can only be
    filler, attends to nothing.

    `causal`: a token attends to itself and the tokens before it. `window`: only to the last so many
    of these, itself included. `scale` is 1 / √K when None. `softcap`: logits x become softcap ·
    tanh(x / softcap). `bias_HX` comes from `RelativeBias`.

    Each document is computed by itself. So a token of one document cannot change another by even
    one bit, no mask over the row is materialised, and a document costs only the square of its own
    length. With `share_calls`, many short documents of a row, such as sentences, may share a masked
    call instead; then other documents in the micro-batch change the result by rounding.
    """
    assert causal or window is None, "a window looks back from a token"
    assert (not causal and bias_HX is None) or sources is None, "there is no order between two documents"
    keys = documents if sources is None else sources
    reach = Reach(causal=causal, window=window, scale=scale, softcap=softcap, bias_HX=bias_HX, dropout=dropout)
    if share_calls and reach.fused and window is None and _share_a_call(documents) and _share_a_call(keys):
        return _attend_in_rows(q_BSHK, k_BSGK, v_BSGK, documents, keys, reach)
    spans = documents.spans(keys)
    if reach.fused and bias_HX is None and suits_blocks(q_BSHK, k_BSGK.shape[2], spans):
        return block_attention(q_BSHK, k_BSGK, v_BSGK, spans, causal=causal, window=window, scale=scale)
    if reach.fused and bias_HX is None and suits_varlen(q_BSHK, documents.lengths, keys.lengths, window):
        lengths = documents.lengths, keys.lengths
        return varlen_attention(q_BSHK, k_BSGK, v_BSGK, *lengths, causal=causal, window=window, scale=scale)
    if dropout is None and bias_HX is None and suits_flex(q_BSHK, softcap):
        numbers = documents.numbers_BS, keys.numbers_BS
        return flex_attention(q_BSHK, k_BSGK, v_BSGK, numbers, causal=causal, window=window, scale=scale, softcap=softcap)
    return attend_in_each(q_BSHK, k_BSGK, v_BSGK, spans, reach)


def attend_in_each(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, spans: Sequence[Span], reach: Reach) -> Tensor:
    """Attend in each document by a call of its own."""
    runs = [list(run) for _, run in groupby(spans, key=lambda span: span.rows)]
    rows = []
    for run, q, k, v in zip(runs, *(_cut(x, [run[0].rows for run in runs], 0) for x in (q_BSHK, k_BTGK, v_BTGK)), strict=True):
        queries, keys = [span.queries for span in run], [span.keys for span in run]
        parts = zip(run, _cut(q, queries, 1), _cut(k, keys, 1), _cut(v, keys, 1), strict=False)
        outs = [
            _attend_in_document(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), reach, _Place(span.rows.start, span.queries.start)
            )
            for span, q, k, v in parts
        ]
        rows.append(_joined([out.transpose(1, 2) for out in outs], 1))
    return _joined(rows, 0)


def _cut(x: Tensor, slices: Sequence[slice], dim: int) -> Sequence[Tensor]:
    """Return the parts of a dim that follow one another; what is behind them is one more part.

    One call, because the gradient of a slice has the size of the whole.
    """
    sizes = [part.stop - part.start for part in slices]
    rest = x.shape[dim] - sum(sizes)
    return [x] if sizes == [x.shape[dim]] else x.split([*sizes, rest] if rest else sizes, dim)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _share_a_call(documents: Documents) -> bool:
    rows, seq_len = documents.shape
    number = sum(map(len, documents.lengths))
    return number >= MANY * rows and rows * seq_len**2 < PAIRS_PER_CALL * number


def _attend_in_rows(
    q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, queries: Documents, keys: Documents, reach: Reach
) -> Tensor:
    """Attend in all documents in one call, where tokens of other documents weigh exactly 0."""
    mask_BST = queries.numbers_BS.unsqueeze(2) == keys.numbers_BS.unsqueeze(1)
    if reach.causal:
        mask_BST = mask_BST.tril()
    mask_BST |= ~mask_BST.any(-1, keepdim=True)  # filler without a source: no softmax over nothing
    q, k, v = (part.transpose(1, 2) for part in (q_BSHK, k_BTGK, v_BTGK))
    # Positions in the row serve: two tokens of one document are as far apart in it as in the row.
    mask = _mask_or_bias(mask_BST.unsqueeze(1).to(q.device), range(q.shape[2]), range(k.shape[2]), reach, q.dtype)
    return _fused(q, k, v, reach, attn_mask=mask).transpose(1, 2)


class _Place(NamedTuple):
    """The place in the micro-batch where a document begins."""

    row: int
    token: int


class _Block(NamedTuple):
    """A block of queries: where it begins in the micro-batch, and the positions in the document of
    its queries and keys."""

    row: int
    token: int
    queries: range
    keys: range


def _attend_in_document(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, reach: Reach, place: _Place) -> Tensor:
    """Attend in one fused call if it needs no mask, bias or change of logits and weights; else in
    blocks of queries."""
    length, num_keys = q_BHSK.shape[2], k_BGSK.shape[2]
    if not num_keys:
        return q_BHSK * 0.0  # keeps its place in the graph
    if reach.fused and reach.bias_HX is None and (reach.window is None or reach.window >= length):
        return _fused(q_BHSK, k_BGSK, v_BGSK, reach, is_causal=reach.causal)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if reach.window is None else max(0, start - reach.window + 1)
        last = end if reach.causal else num_keys
        queries, keys = range(start, end), range(first, last)
        kv = k_BGSK[:, :, first:last], v_BGSK[:, :, first:last]
        mask = _mask(queries, keys, reach, q_BHSK.device)
        q = q_BHSK[:, :, start:end]
        if reach.fused:
            blocks.append(_fused(q, *kv, reach, attn_mask=_mask_or_bias(mask, queries, keys, reach, q.dtype)))
        else:
            here = _Block(place.row, place.token + start, queries, keys)
            blocks.append(checkpoint(_written_out, q, *kv, mask, reach, here, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, dim=2)


def _fused(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, reach: Reach, **masking: Any) -> Tensor:
    gqa = q_BHSK.shape[1] != k_BGSK.shape[1]
    return functional.scaled_dot_product_attention(q_BHSK, k_BGSK, v_BGSK, scale=reach.scale, enable_gqa=gqa, **masking)


def _mask(queries: range, keys: range, reach: Reach, device: torch.device) -> Tensor | None:
    """Return a mask [S, T]: True where a query at these positions attends to a key. None where each
    attends to all."""
    if not reach.causal:
        return None
    ages_ST = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1) - torch.arange(
        keys.start, keys.stop, device=device
    )
    return ages_ST >= 0 if reach.window is None else (ages_ST >= 0) & (ages_ST < reach.window)


def _mask_or_bias(mask: Tensor | None, queries: range, keys: range, reach: Reach, dtype: torch.dtype) -> Tensor | None:
    """Return what a fused kernel adds to the logits: the mask, or the bias, −∞ where masked."""
    if reach.bias_HX is None:
        return mask
    bias_BHST = by_place(reach.bias_HX, queries, keys).to(dtype).unsqueeze(0)
    return bias_BHST if mask is None else bias_BHST.masked_fill(~mask, -torch.inf)


def _written_out(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_ST: Tensor | None, reach: Reach, block: _Block) -> Tensor:
    """Attend with soft-capped logits or with dropout of the weights; logits and softmax are in
    fp32.

    No fused kernel caps logits, and none takes a dropout mask from outside: its own mask would
    differ between layouts. Run under recompute, as flash attention does too, so that a block's [H,
    S, T] logits live only while it is computed.
    """
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    scale = q_BHSK.shape[-1] ** -0.5 if reach.scale is None else reach.scale
    # R query heads share one key/value head.
    q_BGRSK: Tensor = q_BHSK.unflatten(1, (k_BGTK.shape[1], -1))
    logits_BGRST = (q_BGRSK @ k_BGTK.unsqueeze(2).mT).to(wide) * scale
    if reach.softcap is not None:
        logits_BGRST = soft_cap(logits_BGRST, reach.softcap)
    if reach.bias_HX is not None:
        bias_HST = by_place(reach.bias_HX.to(wide), block.queries, block.keys)
        logits_BGRST = logits_BGRST + bias_HST.unflatten(0, q_BGRSK.shape[1:3])
    if mask_ST is not None:
        logits_BGRST = logits_BGRST.masked_fill(~mask_ST, -torch.inf)
    weights_BGRST = logits_BGRST.softmax(-1).to(v_BGTK.dtype)
    if reach.dropout is not None:
        weights_BGRST = _dropped(weights_BGRST, reach.dropout, block)
    return (weights_BGRST @ v_BGTK.unsqueeze(2)).flatten(1, 2)


def _dropped(weights_BGRST: Tensor, given: WeightDropout, block: _Block) -> Tensor:
    B, G, R, S, T = weights_BGRST.shape
    rows = range(block.row, block.row + B)
    keeps_BHST = given.streams.keeps_weights(
        given.site, given.rate, rows, given.heads, (S, T), block.token, weights_BGRST.device
    )
    return dropout(weights_BGRST, keeps_BHST.unflatten(1, (G, R)), given.rate)


class ParallelAttention(torch.nn.Module):
    """Self-attention with its heads divided: each tensor rank holds H/p query heads and the
    key/value heads they use.

    With fewer key/value heads than ranks (G < p) the p / G ranks of `kv_copies`, neighbours in the
    group, hold the same one (Shazeer 2019, arXiv:1911.02150; Ainslie et al. 2023,
    arXiv:2305.13245). The gradients of its weights are summed over them.

    Forward: X [N, D], or this rank's tokens of it → fused column-parallel Q, K, V → attention of
    the local heads over whole sequences, no communication → row-parallel output projection.
    Communication: that of the two linear layers.

    `recompute`: compute the attention core (rotation, softmax, weighted sum) again in backward
    instead of keeping it, the selective recomputation of Korthikanti et al. 2022, arXiv:2205.05198,
    §5.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query: Output,
        key: Output,
        value: Output,
        out: str,
        qkv_bias: bool,
        out_bias: bool,
        transposed: bool,
        dropout: float,
        causal: bool,
        init: Init,
        out_init: Init,
        tp: TensorParallel,
        kv_copies: Group,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qk_norm: QueryKeyNorm | None = None,
        relative_bias: RelativeBias | None = None,
        recompute: bool = False,
        share_calls: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = tp.group.part(num_heads, "attention heads")
        self.num_kv_heads = tp.group.part(num_kv_heads * kv_copies.size, "key/value heads and their copies")
        self.head_dim = head_dim
        self.dropout = dropout
        self.site = f"{out}.weights"
        self.heads = range(tp.group.rank * self.num_heads, (tp.group.rank + 1) * self.num_heads)
        self.attend = partial(attend, causal=causal, window=window, scale=scale, softcap=softcap, share_calls=share_calls)
        self.qk_norm = qk_norm
        self.relative_bias = relative_bias
        self.recompute = recompute
        divided, shared = ([query, key, value], []) if kv_copies.size == 1 else ([query], [key, value])
        self.qkv = ColumnParallelLinear(
            hidden_size,
            divided,
            shared=shared,
            copies=kv_copies,
            bias=qkv_bias,
            init=init,
            transposed=transposed,
            tp=tp,
        )
        self.out = RowParallelLinear(
            num_heads * head_dim, hidden_size, name=out, bias=out_bias, init=out_init, transposed=transposed, tp=tp
        )

    def forward(self, x_ND: Tensor, documents: Documents, rotation: Rotation | None, streams: Streams | None) -> Tensor:
        """Return [N, D], or this rank's tokens of it. With `streams` None nothing is dropped."""
        H, G = self.num_heads, self.num_kv_heads
        qkv_BSNK = self.qkv(x_ND, streams).view(*documents.shape, H + 2 * G, self.head_dim)
        bias_HX = None if self.relative_bias is None else self.relative_bias(documents.shape[1])
        v_BSGK = None
        if self.qk_norm is not None:
            qk, v_BSGK = qkv_BSNK.split([H + G, G], dim=2)
            qkv_BSNK = self.qk_norm(qk, H)
        core = qkv_BSNK, v_BSGK, bias_HX, documents, rotation, streams
        if self.recompute and torch.is_grad_enabled():
            y_BSHK = checkpoint(self._core, *core, use_reentrant=False, preserve_rng_state=False)
        else:
            y_BSHK = self._core(*core)
        return self.out(y_BSHK.flatten(2).flatten(0, 1), streams)

    def _core(
        self,
        qkv_BSNK: Tensor,
        v_BSGK: Tensor | None,
        bias_HX: Tensor | None,
        documents: Documents,
        rotation: Rotation | None,
        streams: Streams | None,
    ) -> Tensor:
        """Attend. `qkv_BSNK` holds queries and keys, and the values where `v_BSGK` is None."""
        H, G = self.num_heads, self.num_kv_heads
        if rotation is None:
            q_BSHK, k_BSGK, others = qkv_BSNK.tensor_split([H, H + G], dim=2)
        else:
            q_BSHK, k_BSGK, others = Rotate.apply(qkv_BSNK, *rotation, H, G)
        v_BSGK = others if v_BSGK is None else v_BSGK
        dropped = None
        if self.dropout and streams is not None:
            dropped = WeightDropout(rate=self.dropout, streams=streams, site=self.site, heads=self.heads)
        return self.attend(q_BSHK, k_BSGK, v_BSGK, documents, bias_HX=bias_HX, dropout=dropped)
