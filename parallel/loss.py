"""Vocabulary-parallel head and cross entropy that never hold the logits of a whole micro-batch.

Shape letters: N tokens of a micro-batch, D model, V vocabulary (local: this rank's rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.collectives import all_reduce
from parallel.embedding import VocabParallelEmbedding, vocabulary_piece, vocabulary_shard, vocabulary_weight
from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, ShardSpec
from parallel.soft_cap import soft_cap
from parallel.tensor import TensorParallel

IGNORE = -100  # label of a position that is not a target, as in torch and transformers
CHUNK_BYTES = 32 << 20  # fp32 logits held at a time: fits a server CPU's L3, and is launch-bound on no GPU


class _CrossEntropySum(torch.autograd.Function):
    """Σ over targets of −log softmax(cap(h Wᵀ + b))[label], with the gradients computed chunk by chunk in forward.

    cap(x) = c · tanh(x / c) where there is a soft cap c, else x; b may be None. With a smoothing ε the share ε of the label's
    weight is divided evenly over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567, §7), as torch's cross_entropy does.

    In forward each chunk's logits are still in cache, so backward neither keeps nor recomputes them: three matrix products
    in all, the least possible. Forward: h [N, D] replicated, W [V/p, D], b [V/p] → scalar, replicated. Communication per chunk:
    the all-reduced maximum, then denominator and target logit together. Backward: two scalings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        vocab_size: int,
        group: Group,
        softcap: float | None,
        smoothing: float,
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        trains_weight, trains_bias = ctx.needs_input_grad[1:3]
        w_VD = weight_VD.to(h_ND.dtype)
        first, rows = vocabulary_shard(vocab_size, group)
        real = min(rows, max(0, vocab_size - first))  # columns that are not padding
        wide = _wide(h_ND)
        loss = torch.zeros((), dtype=wide, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if wants_grad else None
        # Several chunks are summed in fp32: in bf16 the sum would lose what later chunks add.
        grad_w = torch.zeros(w_VD.shape, dtype=wide, device=w_VD.device) if trains_weight else None
        grad_b = torch.zeros(bias_V.shape, dtype=wide, device=w_VD.device) if trains_bias and bias_V is not None else None
        for part in _chunks(h_ND.shape[0], rows):
            labels = labels_N[part]
            is_target = labels != IGNORE
            local = labels - first
            is_here = is_target & (local >= 0) & (local < rows)
            column = local.masked_fill(~is_here, 0).unsqueeze(-1)

            logits = _logits(h_ND[part], w_VD, bias_V, softcap)
            if softcap is not None and wants_grad:
                slope = 1.0 - logits.div(softcap).square_()
            _mask_padding(logits, first, vocab_size)
            logits.sub_(all_reduce(logits.amax(-1, keepdim=True), group, dist.ReduceOp.MAX))
            target = logits.gather(-1, column).squeeze(-1).masked_fill(~is_here, 0.0)
            if smoothing:
                target = (1.0 - smoothing) * target + smoothing / vocab_size * logits[:, :real].sum(-1)
            probabilities = logits.exp_()
            totals = all_reduce(torch.stack([probabilities.sum(-1), target]), group)
            loss += (totals[0].log() - totals[1]).masked_fill(~is_target, 0.0).sum()
            if grad_h is None:
                continue
            # d loss / d logits = softmax − the label's weights on targets, exactly 0 elsewhere (masked: NaN · 0 is NaN).
            probabilities.div_(totals[0].unsqueeze(-1))
            probabilities.scatter_add_(-1, column, (smoothing - 1.0) * is_here.to(wide).unsqueeze(-1))
            if smoothing:
                probabilities[:, :real].sub_(smoothing / vocab_size)
            if softcap is not None:
                probabilities.mul_(slope)
            probabilities.masked_fill_(~is_target.unsqueeze(-1), 0.0)
            if grad_b is not None:
                grad_b += probabilities.sum(0)
            delta = probabilities.to(h_ND.dtype)
            grad_h[part] = delta @ w_VD
            if grad_w is not None:
                grad_w += delta.t() @ h_ND[part]
        if grad_h is not None:
            ctx.save_for_backward(grad_h, grad_w, grad_b)
            ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        weight, bias = (None if grads is None else (grads * grad).to(ctx.weight_dtype) for grads in (grad_w, grad_b))
        return grad_h * grad, weight, bias, None, None, None, None, None


@torch.no_grad()
def cross_entropy_and_hits(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    vocab_size: int,
    group: Group,
    softcap: float | None,
) -> Tensor:
    """The loss of `_CrossEntropySum`, and of how many targets the label has the highest logit (of equal ones the lowest id
    counts), float64 [2], the same on every rank. Communication per chunk: maximum, lowest id, then denominator and target
    logit together."""
    w_VD = weight_VD.to(h_ND.dtype)
    first, rows = vocabulary_shard(vocab_size, group)
    sums = torch.zeros(2, dtype=torch.float64, device=h_ND.device)
    for part in _chunks(h_ND.shape[0], rows):
        labels = labels_N[part]
        is_target = labels != IGNORE
        local = labels - first
        is_here = is_target & (local >= 0) & (local < rows)

        logits = _logits(h_ND[part], w_VD, bias_V, softcap)
        _mask_padding(logits, first, vocab_size)
        highest, column = logits.max(-1)  # the first of equal ones
        overall = all_reduce(highest, group, dist.ReduceOp.MAX)
        guess = all_reduce(torch.where(highest == overall, first + column, vocab_size), group, dist.ReduceOp.MIN)
        logits.sub_(overall.unsqueeze(-1))
        target = logits.gather(-1, local.masked_fill(~is_here, 0).unsqueeze(-1)).squeeze(-1).masked_fill(~is_here, 0.0)
        totals = all_reduce(torch.stack([logits.exp_().sum(-1), target]), group)
        sums[0] += (totals[0].log() - totals[1]).masked_fill(~is_target, 0.0).sum()
        sums[1] += (is_target & (guess == labels)).sum()
    return sums


def _wide(h_ND: Tensor) -> torch.dtype:
    return torch.float64 if h_ND.dtype == torch.float64 else torch.float32


def _chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Tokens whose logits over `rows` of the vocabulary are held together."""
    step = max(1, CHUNK_BYTES // (4 * rows))
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _logits(h_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """cap(h Wᵀ + b), wide, [N, V/p]."""
    logits = (h_ND @ w_VD.t()).to(_wide(h_ND))
    if bias_V is not None:
        logits.add_(bias_V)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _mask_padding(logits_NV: Tensor, first: int, vocab_size: int) -> None:
    rows = logits_NV.shape[-1]
    padding = first + rows - vocab_size
    if padding > 0:
        logits_NV[:, max(0, rows - padding) :] = -torch.inf


class VocabParallelHead(Sharded):
    """Logits' matrix W [V/p, D], its own, borrowed from the embedding, or a copy of the embedding of the first pipeline stage
    (`tied_over` the ranks of both), their bias [V/p], and the loss that goes with them.

    `forward` with labels [N] (IGNORE where there is no target): h [N, D], or this rank's tokens of it → the loss summed over
    targets, an fp32 scalar, the same on every rank of the group; `measured`, without gradients, that and the number of targets
    whose label has the highest logit, float64 [2]. Without labels: this rank's logits [N, V/p], for sampling
    and oracles. `bias`: its logical tensor's name, None: there is none; `bias_is_row`: that is [1, V], not [V]. `softcap`:
    logits x become softcap · tanh(x / softcap).
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        name: str,
        init: Init,
        tp: TensorParallel,
        tied_to: VocabParallelEmbedding | None = None,
        tied_over: Group | None = None,
        bias: str | None = None,
        bias_is_row: bool = False,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.softcap = softcap
        self.vocab_size = vocab_size
        if tied_to is None:
            role = Role.MATRIX if tied_over is None else Role.EMBEDDING
            self.declare("weight", *vocabulary_weight(name, vocab_size, hidden_size, role, init, tp.group, tied_over))
        else:
            self.borrow("weight", tied_to)
        if bias is None:
            self.bias = None
        else:
            piece = vocabulary_piece(bias, (vocab_size,), tp.group)
            shape: tuple[int, ...] = (vocabulary_shard(vocab_size, tp.group)[1],)
            if bias_is_row:
                piece = Piece(bias, (1, *piece.shape), (0, *piece.start), (1, *piece.size), transposed=True)
                shape = (*shape, 1)
            self.declare("bias", shape, ShardSpec(Role.BIAS, Init(), (piece,), Group.alone()))

    def forward(
        self, h_ND: Tensor, labels_N: Tensor | None = None, *, measured: bool = False, smoothing: float = 0.0
    ) -> Tensor:
        """`smoothing`: the share of a label's weight that is divided evenly over the vocabulary; nothing measured has it."""
        h_ND = self.tp.enter(h_ND)
        bias_V = None if self.bias is None else self.bias.flatten()
        if labels_N is None:
            bias_V = None if bias_V is None else bias_V.to(h_ND.dtype)
            logits_NV = functional.linear(h_ND, self.weight.to(h_ND.dtype), bias_V)
            return logits_NV if self.softcap is None else soft_cap(logits_NV, self.softcap)
        of_head = h_ND, self.weight, bias_V, labels_N, self.vocab_size, self.tp.group, self.softcap
        return cross_entropy_and_hits(*of_head) if measured else _CrossEntropySum.apply(*of_head, smoothing)
