"""Attention on CPUs in blocks of queries, with a backward of its own.

torch's fused kernel for CPUs multiplies by small tiles: in bf16 at a ninth of the rate of the
processor's matrix products. Here a block of queries meets all of its keys in one product, which
runs at that rate, and the softmax of a row is whole, so that nothing has to be rescaled. Keys after
the block are left out, and nothing is masked but the triangle on the diagonal. Backward keeps
queries, keys and values, and computes the weights of a block again (Dao et al. 2022,
arXiv:2205.14135, §3.1, without its tiles of keys).

Shape letters: B batch, S queries, T keys, G key/value heads, R query heads that share one of them,
H = G · R, K head dim, M = B · G matrices that are multiplied together, Q = R · (queries of a
block).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.autograd import TensorFunction
from parallel.documents import Span
from parallel.products import by_onednn, takes_onednn

# Queries of a block: fewer waste less on the diagonal, more multiply faster. With long rows of keys
# the weights of a block leave the cache, whatever its size.
BLOCK, LONG_BLOCK, LONG = 128, 256, 2048
# Multiplications of a product below which oneDNN, which takes matrices one at a time, loses to the
# fused kernel in fp32.
SMALL_ALONE = 1 << 23


def suits_blocks(q_BSHK: Tensor, kv_heads: int, spans: Sequence[Span]) -> bool:
    """Return whether attention by blocks is faster here than torch's fused kernel.

    In bf16 it is: 1.2 to 4 times at lengths of 64 and more. In fp32 it is where oneDNN multiplies
    faster than MKL, which the fused kernel calls: 1.1 to 1.9 times at 512 and more. What is checked
    in fp64 is checked here.
    """
    if q_BSHK.device.type != "cpu":
        return False
    if q_BSHK.dtype in (torch.bfloat16, torch.float64):
        return True
    longest = max(spans, key=lambda span: span.keys.stop - span.keys.start)
    lengths = [part.stop - part.start for part in longest[1:]]
    return _alone(q_BSHK, q_BSHK.shape[2] // kv_heads, *lengths)


def reads_by_head(x_BSNK: Tensor, sharing: int) -> bool:
    """Return whether queries, keys and values of such rows are best by head in memory, where a head
    is multiplied as a matrix. The fused kernel wants them by token: its output, which is kept, lies
    as its queries do."""
    if x_BSNK.device.type != "cpu":
        return False
    S = x_BSNK.shape[1]
    return x_BSNK.dtype in (torch.bfloat16, torch.float64) or _alone(x_BSNK, sharing, S, S)


def _alone(q: Tensor, sharing: int, num_queries: int, num_keys: int) -> bool:
    """Return whether matrices are multiplied one at a time, by oneDNN."""
    size = min(num_queries, _block_size(sharing, num_keys, alone=True))
    multiplications = sharing * size * num_keys * q.shape[-1]
    return multiplications >= SMALL_ALONE and takes_onednn(q, multiplications)


def _block_size(sharing: int, num_keys: int, *, alone: bool) -> int:
    """Return the number of queries of a block; `sharing`: the query heads of a key/value head."""
    return LONG_BLOCK if num_keys > LONG or (alone and sharing == 1) else BLOCK


def block_attention(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    spans: Sequence[Span],
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(Q Kᵀ · scale) V inside each document, [B, S, H, K]; 0 in one without keys.

    `spans` divide the queries. `causal`: query i of a document attends to its keys up to i.
    `window`: only to the last so many of these. `scale` is 1 / √K when None.
    """
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    return _BlockAttention.apply(q_BSHK, k_BTGK, v_BTGK, spans, _Reach(causal, window), scale)


@dataclass(frozen=True)
class _Reach:
    """The keys to which a query attends."""

    causal: bool
    window: int | None

    def blocks(self, num_queries: int, num_keys: int, size: int, dtype: torch.dtype) -> list[_Block]:
        """Return the blocks of `size` queries, the last of which may be smaller."""
        triangle = torch.full((size, size), -torch.inf, dtype=dtype).triu(1) if self.causal else None
        blocks = []
        for start in range(0, num_queries, size):
            queries = slice(start, min(start + size, num_queries))
            first = 0 if self.window is None else max(0, start - self.window + 1)
            keys = slice(first, queries.stop if self.causal else num_keys)
            blocks.append(_Block(queries, keys, queries.stop - start == size, self.window, triangle))
        return blocks


@dataclass(frozen=True)
class _Block:
    """The positions of a block's queries, and of the keys that any of them attends to."""

    queries: slice
    keys: slice
    full: bool  # it has as many queries as a block may have
    window: int | None
    triangle: Tensor | None  # −∞ above the diagonal; None if each query attends to all keys

    def mask(self, logits_MQT: Tensor) -> None:
        """Set the logits of the keys that a query does not attend to to −∞."""
        if self.triangle is None:
            return
        queries = self.queries.stop - self.queries.start
        logits_MRST = logits_MQT.unflatten(1, (-1, queries))
        logits_MRST[..., -queries:] += self.triangle[:queries, :queries]
        if self.window is None:
            return
        # Query i begins at key i of those here, or at an earlier one if the row begins within its
        # window.
        early = max(0, self.window - 1 - self.queries.start)
        too_old = torch.ones(queries, max(0, queries - 1 - early), dtype=torch.bool).tril(-1 - early)
        logits_MRST[..., : too_old.shape[1]].masked_fill_(too_old[:, : logits_MRST.shape[-1]], -torch.inf)


class _BlockAttention(TensorFunction):
    """See `block_attention`. One function for all documents: autograd would give each of them
    gradients of the size of all.

    Backward: dV = Pᵀ dO, dS = P ∘ (dP − Σ P dP) with P the weights and dP = dO Vᵀ, dQ = dS K, dK =
    dSᵀ Q; dK and dV are summed over the blocks in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, spans: Sequence[Span], reach: _Reach, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q_BSHK, k_BTGK, v_BTGK)
        ctx.spans, ctx.reach, ctx.scale = spans, reach, scale
        out_BSHK = torch.empty(q_BSHK.shape, dtype=q_BSHK.dtype)
        for span in spans:
            if span.keys.start == span.keys.stop:
                span.of_queries(out_BSHK).zero_()
                continue
            work = _Work.of(span.of_queries(q_BSHK), span.of_keys(k_BTGK), span.of_keys(v_BTGK), reach, scale)
            work.attend(into_BHSK=span.of_queries(out_BSHK))
        return out_BSHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHK: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHK, k_BTGK, v_BTGK = ctx.saved_tensors
        dq_BSHK, dk_BTGK, dv_BTGK = (torch.zeros(x.shape, dtype=x.dtype) for x in (q_BSHK, k_BTGK, v_BTGK))
        for span in ctx.spans:
            if span.keys.start == span.keys.stop:
                continue
            work = _Work.of(span.of_queries(q_BSHK), span.of_keys(k_BTGK), span.of_keys(v_BTGK), ctx.reach, ctx.scale)
            dk_MTK, dv_MTK = work.gradients(span.of_queries(grad_BSHK), ctx.scale, into_BHSK=span.of_queries(dq_BSHK))
            for into, grad_MTK in ((dk_BTGK, dk_MTK), (dv_BTGK, dv_MTK)):
                into_BGTK = span.of_keys(into)
                into_BGTK.copy_(grad_MTK.view(into_BGTK.shape))
        return dq_BSHK, dk_BTGK, dv_BTGK, None, None, None


@dataclass(frozen=True)
class _Work:
    """The operands of a document as matrices that are contiguous, and what is computed from
    them."""

    q_MRSK: Tensor  # times the scale
    k_MTK: Tensor
    v_MTK: Tensor
    blocks: list[_Block]
    alone: bool  # matrices are multiplied one at a time, by oneDNN

    @classmethod
    def of(cls, q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, reach: _Reach, scale: float) -> _Work:
        B, H, S, K = q_BHSK.shape
        G, T = k_BGTK.shape[1:3]
        q_BHSK = torch.mul(q_BHSK, scale, out=torch.empty((B, H, S, K), dtype=q_BHSK.dtype))
        k_MTK, v_MTK = (x.contiguous().view(B * G, T, K) for x in (k_BGTK, v_BGTK))
        alone = _alone(q_BHSK, H // G, S, T)
        blocks = reach.blocks(S, T, _block_size(H // G, T, alone=alone), q_BHSK.dtype)
        return cls(q_BHSK.view(B * G, H // G, S, K), k_MTK, v_MTK, blocks, alone)

    @property
    def parts(self) -> Iterator[slice]:
        """The matrices that are multiplied at a time."""
        number = self.k_MTK.shape[0]
        step = 1 if self.alone else number
        return (slice(start, start + step) for start in range(0, number, step))

    def attend(self, into_BHSK: Tensor) -> None:
        for part in self.parts:
            for block in self.blocks:
                y_MQK = self.products(self.weights(part, block), self.v_MTK[part, block.keys], block)
                self.put(y_MQK, part, block, into_BHSK)

    def gradients(self, grad_BHSK: Tensor, scale: float, *, into_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of keys and values, [M, T, K] in fp32, from that of the output;
        write that of the queries."""
        grad_MRSK = grad_BHSK.reshape(self.q_MRSK.shape)
        wide = torch.promote_types(grad_BHSK.dtype, torch.float32)
        dk_MTK, dv_MTK = (torch.zeros_like(x, dtype=wide) for x in (self.k_MTK, self.v_MTK))
        for part in self.parts:
            for block in self.blocks:
                keys = part, block.keys
                weights_MQT = self.weights(part, block)
                grad_MQK = grad_MRSK[part, :, block.queries].flatten(1, 2)
                of_weights = self.products(grad_MQK, self.v_MTK[keys].mT, block)
                slopes_MQT = torch._softmax_backward_data(of_weights, weights_MQT, -1, weights_MQT.dtype)
                dq_MQK = self.products(slopes_MQT, self.k_MTK[keys], block).mul_(scale)
                self.put(dq_MQK, part, block, into_BHSK)
                _add_products(dk_MTK[keys], slopes_MQT.mT, self.queries(part, block))
                _add_products(dv_MTK[keys], weights_MQT.mT, grad_MQK)
        return dk_MTK, dv_MTK

    def queries(self, part: slice, block: _Block) -> Tensor:
        """Return the block's queries, times the scale, [M, Q, K]."""
        return self.q_MRSK[part, :, block.queries].flatten(1, 2)

    def put(self, y_MQK: Tensor, part: slice, block: _Block, into_BHSK: Tensor) -> None:
        """Write what was computed for the block's queries to its place."""
        G = self.k_MTK.shape[0] // into_BHSK.shape[0]
        into_BGRSK = into_BHSK.unflatten(1, (G, -1))[..., block.queries, :]
        if self.alone:
            into_BGRSK[divmod(part.start, G)] = y_MQK.view(into_BGRSK.shape[2:])
        else:
            into_BGRSK.copy_(y_MQK.view(into_BGRSK.shape))

    def weights(self, part: slice, block: _Block) -> Tensor:
        """Return softmax(Q Kᵀ · scale) of the block, [M, Q, T]."""
        logits_MQT = self.products(self.queries(part, block), self.k_MTK[part, block.keys].mT, block)
        block.mask(logits_MQT)
        return logits_MQT.softmax(-1)

    def products(self, a_MXY: Tensor, b_MYZ: Tensor, block: _Block) -> Tensor:
        """Return A B of each matrix. A block of odd size is left to MKL: oneDNN compiles for each
        shape anew, which takes 0.3 ms."""
        if self.alone and block.full:
            return by_onednn(a_MXY[0], b_MYZ[0].t()).unsqueeze(0)
        return torch.bmm(a_MXY, b_MYZ)


def _add_products(into_MXZ: Tensor, a_MXY: Tensor, b_MYZ: Tensor) -> None:
    if into_MXZ.dtype == a_MXY.dtype:
        into_MXZ.baddbmm_(a_MXY, b_MYZ)
    else:
        into_MXZ += torch.bmm(a_MXY, b_MYZ)
