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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.autograd import TensorFunction
from parallel.products import by_onednn, takes_onednn

# Queries of a block: fewer waste less on the diagonal, more multiply faster. With long rows of keys
# the weights of a block leave the cache, whatever its size.
BLOCK, LONG_BLOCK, LONG = 128, 256, 2048
# Multiplications of a product below which oneDNN, which takes matrices one at a time, loses to the
# fused kernel in fp32.
SMALL_ALONE = 1 << 23


def suits_blocks(q_BHSK: Tensor, k_BGTK: Tensor) -> bool:
    """Return whether attention by blocks is faster here than torch's fused kernel.

    In bf16 it is: 1.2 to 4 times at lengths of 64 and more. In fp32 it is where oneDNN multiplies
    faster than MKL, which the fused kernel calls: 1.1 to 1.9 times at 512 and more. What is checked
    in fp64 is checked here.
    """
    if q_BHSK.device.type != "cpu":
        return False
    return q_BHSK.dtype in (torch.bfloat16, torch.float64) or _alone(q_BHSK, k_BGTK)


def _alone(q_BHSK: Tensor, k_BGTK: Tensor) -> bool:
    """Return whether matrices are multiplied one at a time, by oneDNN."""
    H, S, K = q_BHSK.shape[1:]
    G, T = k_BGTK.shape[1:3]
    multiplications = H // G * min(S, _block_size(H // G, T, alone=True)) * T * K
    return multiplications >= SMALL_ALONE and takes_onednn(q_BHSK, multiplications)


def _block_size(sharing: int, num_keys: int, *, alone: bool) -> int:
    """Return the number of queries of a block; `sharing`: the query heads of a key/value head."""
    return LONG_BLOCK if num_keys > LONG or (alone and sharing == 1) else BLOCK


def block_attention(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, *, causal: bool, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(Q Kᵀ · scale) V, [B, H, S, K], whose tokens are contiguous: [B, S, H, K] in
    memory.

    `causal`: query i attends to the keys up to i. `window`: only to the last so many of these.
    `scale` is 1 / √K when None.
    """
    scale = q_BHSK.shape[-1] ** -0.5 if scale is None else scale
    return _BlockAttention.apply(q_BHSK, k_BGTK, v_BGTK, _Reach(causal, window), scale)


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
    """See `block_attention`. Backward: dV = Pᵀ dO, dS = P ∘ (dP − Σ P dP) with P the weights and dP
    = dO Vᵀ, dQ = dS K, dK = dSᵀ Q; dK and dV are summed over the blocks in fp32."""

    @staticmethod
    def forward(ctx: Any, q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, reach: _Reach, scale: float) -> Tensor:
        ctx.save_for_backward(q_BHSK, k_BGTK, v_BGTK)
        ctx.reach, ctx.scale = reach, scale
        work = _Work.of(q_BHSK, k_BGTK, v_BGTK, reach, scale)
        out_BHSK = torch.empty_like(q_BHSK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for part in work.parts:
            for block in work.blocks:
                y_MQK = work.products(work.weights(part, block), work.v_MTK[part, block.keys], block)
                work.put(y_MQK, part, block, out_BHSK)
        return out_BHSK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSK, k_BGTK, v_BGTK = ctx.saved_tensors
        work = _Work.of(q_BHSK, k_BGTK, v_BGTK, ctx.reach, ctx.scale)
        grad_MRSK = grad_BHSK.reshape(work.q_MRSK.shape)
        dq_BHSK = torch.empty(q_BHSK.shape, dtype=q_BHSK.dtype)
        wide = torch.promote_types(q_BHSK.dtype, torch.float32)
        dk_MTK, dv_MTK = (torch.zeros_like(x, dtype=wide) for x in (work.k_MTK, work.v_MTK))
        for part in work.parts:
            for block in work.blocks:
                keys = part, block.keys
                weights_MQT = work.weights(part, block)
                grad_MQK = grad_MRSK[part, :, block.queries].flatten(1, 2)
                of_weights = work.products(grad_MQK, work.v_MTK[keys].mT, block)
                slopes_MQT = torch._softmax_backward_data(of_weights, weights_MQT, -1, weights_MQT.dtype)
                dq_MQK = work.products(slopes_MQT, work.k_MTK[keys], block).mul_(ctx.scale)
                work.put(dq_MQK, part, block, dq_BHSK)
                _add_products(dk_MTK[keys], slopes_MQT.mT, work.queries(part, block))
                _add_products(dv_MTK[keys], weights_MQT.mT, grad_MQK)
        dk, dv = (x.to(q_BHSK.dtype).view(k_BGTK.shape) for x in (dk_MTK, dv_MTK))
        return dq_BHSK, dk, dv, None, None


@dataclass(frozen=True)
class _Work:
    """The operands of one call as matrices that are contiguous, and what is computed from them both
    forward and backward."""

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
        alone = _alone(q_BHSK, k_BGTK)
        blocks = reach.blocks(S, T, _block_size(H // G, T, alone=alone), q_BHSK.dtype)
        return cls(q_BHSK.view(B * G, H // G, S, K), k_MTK, v_MTK, blocks, alone)

    @property
    def parts(self) -> Iterator[slice]:
        """The matrices that are multiplied at a time."""
        number = self.k_MTK.shape[0]
        step = 1 if self.alone else number
        return (slice(start, start + step) for start in range(0, number, step))

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
