"""Vocabulary-parallel head and cross entropy, which never hold the logits of a whole micro-batch.

Shape letters: N tokens of a micro-batch, D model, V vocabulary (local: this rank's rows), R tokens
of this rank whose rows of W are a tensor of their own (`parallel.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.autograd import TensorFunction
from parallel.collectives import all_reduce
from parallel.embedding import VocabParallelEmbedding
from parallel.mesh import Group
from parallel.params import Init, Role, ShardSpec
from parallel.pieces import Piece
from parallel.products import add_product, linear, product
from parallel.soft_cap import soft_cap
from parallel.tensor import TensorParallel
from parallel.vocabulary import VocabularyMatrix, vocabulary_piece, vocabulary_shard

IGNORE = -100  # label of a position that is not a target, as in torch and transformers
# fp32 logits held at a time: they fit a server CPU's L3, and no GPU is launch-bound
CHUNK_BYTES = 32 << 20
# Each chunk adds to the gradient of W, which has as many numbers as the logits of D tokens. So a
# chunk of a large vocabulary has that many all the same: with 128,000 rows of 512 the loss takes
# less than half the time that it takes in chunks of 32 MiB.
TOKENS_PER_FEATURE = 1


def chunk_tokens(rows: int, hidden_size: int) -> int:
    """Return how many tokens' logits are held at a time, of a matrix with so many rows here."""
    return max(1, CHUNK_BYTES // (4 * rows), TOKENS_PER_FEATURE * hidden_size)


@dataclass(frozen=True)
class _Output:
    """The rest of a head, beside its weights.

    `places_R`: the rows of W that are a tensor of their own; None if there are none.
    """

    size: int  # V
    group: Group
    softcap: float | None
    places_R: Tensor | None


@dataclass(frozen=True)
class _Vocabulary:
    """The tensors of a head as a matrix product takes them.

    They are this rank's rows of the logits' matrix W [V/p, D], their bias [V/p] or None, and the
    rows [R, D] that stand in place of some of W's, or None. Logits are x = cap(h Wᵀ + b), with
    cap(x) = c · tanh(x / c) if there is a soft cap c, else x.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    own_RD: Tensor | None
    output: _Output

    @classmethod
    def of(cls, weight_VD: Tensor, bias_V: Tensor | None, own_MD: Tensor | None, output: _Output, h: Tensor) -> _Vocabulary:
        """Return the tensors in h's format, the bias in its own, and the rows without their
        padding."""
        own_RD = None if own_MD is None or output.places_R is None else own_MD[: len(output.places_R)].to(h.dtype)
        return cls(weight_VD.to(h.dtype), bias_V, own_RD, output)

    @property
    def size(self) -> int:
        return self.output.size

    @property
    def group(self) -> Group:
        return self.output.group

    @property
    def softcap(self) -> float | None:
        return self.output.softcap

    @property
    def rows(self) -> int:
        return self.weight_VD.shape[0]

    @property
    def first(self) -> int:
        return vocabulary_shard(self.size, self.group)[0]

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.weight_VD.dtype == torch.float64 else torch.float32

    def parts(self, num_tokens: int) -> Iterator[slice]:
        """Return the runs of tokens whose logits are held at the same time."""
        step = chunk_tokens(*self.weight_VD.shape)
        return (slice(start, start + step) for start in range(0, num_tokens, step))

    def products(self, h_ND: Tensor) -> Tensor:
        """Return h Wᵀ [N, V/p]."""
        products = product(h_ND, self.weight_VD.t())
        if self.own_RD is not None and self.output.places_R is not None:
            products.index_copy_(1, self.output.places_R, h_ND @ self.own_RD.t())
        return products

    def chunk(self, h_ND: Tensor, labels_N: Tensor, *, wants_slope: bool) -> _Chunk:
        padding = self.first + self.rows - self.size
        logits = self.products(h_ND)
        slope = None
        if self.bias_V is not None:
            logits = logits.to(self.wide).add_(self.bias_V)
        if self.softcap is not None:
            logits = logits.to(self.wide).div_(self.softcap).tanh_()
            slope = 1.0 - logits.square() if wants_slope else None
            logits.mul_(self.softcap)
        if padding > 0:
            # Not −∞: a rank may have nothing but padding.
            logits[:, max(0, self.rows - padding) :] = torch.finfo(logits.dtype).min
        is_target = labels_N != IGNORE
        local = labels_N - self.first
        return _Chunk(self, logits, slope, is_target, is_target & (local >= 0) & (local < self.rows), local)


class _Losses(NamedTuple):
    """The figures of each token, [N]."""

    losses: Tensor
    log_normalisers: Tensor  # log Σ exp x
    shares: Tensor  # this rank's part of Σ exp x


@dataclass
class _Chunk:
    """The logits [N, V/p] of some tokens, and where their labels lie."""

    vocabulary: _Vocabulary
    logits: Tensor
    slope: Tensor | None  # of the soft cap
    is_target: Tensor
    is_here: Tensor  # bool [N]: the label is one of this rank's rows
    local: Tensor  # int64 [N]: the label, counted from this rank's first row

    def _real(self, values: Tensor) -> Tensor:
        """Return the columns that are not padding."""
        vocabulary = self.vocabulary
        return values[:, : min(vocabulary.rows, max(0, vocabulary.size - vocabulary.first))]

    @property
    def column(self) -> Tensor:
        return self.local.masked_fill(~self.is_here, 0).unsqueeze(-1)

    @cached_property
    def highest(self) -> Tensor:
        """The largest logit of each token on this rank, [N]."""
        return self.logits.amax(-1).to(self.vocabulary.wide)

    @cached_property
    def maximum(self) -> Tensor:
        """The largest logit over all ranks, [N]."""
        return all_reduce(self.highest.clone(), self.vocabulary.group, dist.ReduceOp.MAX)

    def hits(self) -> Tensor:
        """Return True for each target whose label has the highest logit, bool [N].

        Of equal logits the one of the lowest id counts.
        """
        vocabulary = self.vocabulary
        highest, column = self.logits.max(-1)  # the first of equal ones
        guess = torch.where(highest == self.maximum, vocabulary.first + column, vocabulary.size)
        guess = all_reduce(guess, vocabulary.group, dist.ReduceOp.MIN)
        return self.is_target & (guess - vocabulary.first == self.local)

    @cached_property
    def own_softmax(self) -> Tensor:
        """The softmax of this rank's logits alone, [N, V/p], at least fp32: one pass of a fused
        kernel, where to subtract, exp, sum and divide takes four."""
        return self.logits.softmax(-1, dtype=self.vocabulary.wide)

    def losses(self, smoothing: float = 0.0) -> _Losses:
        """Return −log softmax(x)[label] of each token, 0 if it is no target, and more.

        `smoothing`: the share of the label's weight that is divided evenly over the vocabulary.

        Communication: the all-reduced maximum, then denominator and target logit together.
        """
        group, wide = self.vocabulary.group, self.vocabulary.wide
        target = self.logits.gather(-1, self.column).squeeze(-1).to(wide) - self.maximum
        target.masked_fill_(~self.is_here, 0.0)
        if smoothing:
            real = self._real(self.logits)
            others = real.sum(-1, dtype=wide) - real.shape[-1] * self.maximum
            target = (1.0 - smoothing) * target + smoothing / self.vocabulary.size * others
        # The largest of a softmax is 1 / Σ exp(x − max x).
        own_total = (self.highest - self.maximum).exp() / self.own_softmax.amax(-1)
        total, target = all_reduce(torch.stack([own_total, target]), group)
        losses = (total.log() - target).masked_fill(~self.is_target, 0.0)
        return _Losses(losses, total.log() + self.maximum, own_total / total)

    def probabilities(self, shares: Tensor) -> Tensor:
        """Return softmax(x) over all ranks, in place of this rank's own."""
        if self.vocabulary.group.size == 1:
            return self.own_softmax
        return self.own_softmax.mul_(shares.unsqueeze(-1))

    def probabilities_from(self, log_normalisers: Tensor) -> Tensor:
        return (self.logits - log_normalisers.unsqueeze(-1)).exp_()

    def gradients(self, probabilities: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return d losses / d (h Wᵀ + b), made of the probabilities in place.

        On targets it is softmax minus the label's weights, times the cap's slope. Elsewhere it is
        exactly 0, which takes a mask, because NaN · 0 is NaN.
        """
        weight = (smoothing - 1.0) * self.is_here.to(probabilities.dtype).unsqueeze(-1)
        gradients = probabilities.scatter_add_(-1, self.column, weight)
        if smoothing:
            self._real(gradients).sub_(smoothing / self.vocabulary.size)
        if self.slope is not None:
            gradients.mul_(self.slope)
        return gradients.masked_fill_(~self.is_target.unsqueeze(-1), 0.0)


class _Gradients:
    """The gradients of h, W, b and the rows that stand in W.

    They are added up chunk by chunk, from the gradients of the logits.
    """

    def __init__(self, h_ND: Tensor, vocabulary: _Vocabulary, trains: tuple[bool, bool, bool], own_MD: Tensor | None) -> None:
        """Start from zeros; `trains` tells whether W, b and the rows [M, D] are trained."""
        # Several chunks are summed in fp32: in bf16 the sum would lose what later chunks add.
        self._h_ND, self._vocabulary = h_ND, vocabulary
        zeros = partial(torch.zeros, dtype=vocabulary.wide, device=h_ND.device)
        bias_V = vocabulary.bias_V
        self.h = torch.empty_like(h_ND)
        self._trains_weight = trains[0]
        # The first chunk's is kept, and the others are added; without tokens there is none.
        self.weight = zeros(vocabulary.weight_VD.shape) if trains[0] and not len(h_ND) else None
        self.bias = zeros(bias_V.shape) if trains[1] and bias_V is not None else None
        self.own = zeros(own_MD.shape) if trains[2] and own_MD is not None else None

    def add(self, part: slice, of_logits: Tensor) -> None:
        if self.bias is not None:
            self.bias += of_logits.sum(0)
        delta = of_logits.to(self._h_ND.dtype)
        own_RD, places_R = self._vocabulary.own_RD, self._vocabulary.output.places_R
        if own_RD is None or places_R is None:
            self.h[part] = product(delta, self._vocabulary.weight_VD)
        else:
            own_NR = delta[:, places_R]
            delta = delta.index_fill(1, places_R, 0.0)
            self.h[part] = add_product(own_NR @ own_RD, delta, self._vocabulary.weight_VD)
            if self.own is not None:
                self.own[: len(places_R)] += own_NR.t() @ self._h_ND[part]
        if self._trains_weight:
            of_chunk = product(delta.t(), self._h_ND[part])
            self.weight = of_chunk.to(self._vocabulary.wide) if self.weight is None else self.weight.add_(of_chunk)

    def of_weights(self, like: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return the gradients of W, b and the rows, each in the format of its tensor in `like`."""
        return tuple(
            None if grads is None or weight is None else grads.to(weight.dtype)
            for grads, weight in zip((self.weight, self.bias, self.own), like, strict=True)
        )


class _CrossEntropySum(TensorFunction):
    """The sum over targets of −log softmax(x)[label], with gradients computed in forward.

    With a smoothing ε the share ε of the label's weight is divided evenly over the vocabulary
    (Szegedy et al. 2016, arXiv:1512.00567, §7), as torch's cross_entropy does.

    In forward each chunk's logits are still in cache, so backward neither keeps nor recomputes
    them. That takes three matrix products in all, the least possible. Forward: h [N, D] replicated,
    W [V/p, D], b [V/p] → scalar, replicated. Backward: two scalings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        own_MD: Tensor | None,
        output: _Output,
        labels_N: Tensor,
        smoothing: float,
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        vocabulary = _Vocabulary.of(weight_VD, bias_V, own_MD, output, h_ND)
        loss = torch.zeros((), dtype=vocabulary.wide, device=h_ND.device)
        gradients = None
        if wants_grad:
            gradients = _Gradients(h_ND, vocabulary, ctx.needs_input_grad[1:4], own_MD)
        for part in vocabulary.parts(h_ND.shape[0]):
            chunk = vocabulary.chunk(h_ND[part], labels_N[part], wants_slope=wants_grad)
            found = chunk.losses(smoothing)
            loss += found.losses.sum()
            if gradients is not None:
                gradients.add(part, chunk.gradients(chunk.probabilities(found.shares), smoothing))
        if gradients is not None:
            ctx.save_for_backward(gradients.h, gradients.weight, gradients.bias, gradients.own)
            ctx.dtypes = [None if weight is None else weight.dtype for weight in (weight_VD, bias_V, own_MD)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, *of_weights = ctx.saved_tensors
        scaled = (
            None if grads is None else (grads * grad).to(dtype) for grads, dtype in zip(of_weights, ctx.dtypes, strict=True)
        )
        return grad_h * grad, *scaled, None, None, None


@torch.no_grad()
def losses_and_hits(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    own_MD: Tensor | None,
    output: _Output,
    labels_N: Tensor,
) -> Tensor:
    """Return each token's loss, and 1 if its label has the highest logit, float64 [2, N].

    Both are 0 if the token is no target. The result is the same on every rank. Communication per
    chunk: that of the losses, and the lowest id.
    """
    vocabulary = _Vocabulary.of(weight_VD, bias_V, own_MD, output, h_ND)
    found_2N = torch.empty((2, h_ND.shape[0]), dtype=torch.float64, device=h_ND.device)
    for part in vocabulary.parts(h_ND.shape[0]):
        chunk = vocabulary.chunk(h_ND[part], labels_N[part], wants_slope=False)
        found_2N[1, part] = chunk.hits().double()
        found_2N[0, part] = chunk.losses().losses.double()
    return found_2N


class _TokenLosses(TensorFunction):
    """The loss −log softmax(x)[label] of each token, 0 if it is no target, with a gradient each.

    The weight of a token's gradient is known only once the losses are, often those of other tokens
    (of both answers of a pair). The gradient of W is a sum over tokens, so it cannot be computed in
    forward. Instead, backward computes each chunk's logits again, which takes four matrix products
    rather than three. One fp32 number per token is kept, log Σ exp x; with it backward's softmax
    needs no communication. To keep the logits instead would take V numbers per token, the most of
    all that a step holds. Forward: h [N, D] replicated, W [V/p, D], b [V/p] → [N], replicated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        own_MD: Tensor | None,
        output: _Output,
        labels_N: Tensor,
    ) -> Tensor:
        vocabulary = _Vocabulary.of(weight_VD, bias_V, own_MD, output, h_ND)
        losses_N, log_normalisers_N = torch.empty((2, h_ND.shape[0]), dtype=vocabulary.wide, device=h_ND.device).unbind()
        for part in vocabulary.parts(h_ND.shape[0]):
            chunk = vocabulary.chunk(h_ND[part], labels_N[part], wants_slope=False)
            losses_N[part], log_normalisers_N[part], _ = chunk.losses()
        ctx.save_for_backward(h_ND, weight_VD, bias_V, own_MD, labels_N, log_normalisers_N)
        ctx.output = output
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, weight_VD, bias_V, own_MD, labels_N, log_normalisers_N = ctx.saved_tensors
        vocabulary = _Vocabulary.of(weight_VD, bias_V, own_MD, ctx.output, h_ND)
        gradients = _Gradients(h_ND, vocabulary, ctx.needs_input_grad[1:4], own_MD)
        for part in vocabulary.parts(h_ND.shape[0]):
            chunk = vocabulary.chunk(h_ND[part], labels_N[part], wants_slope=True)
            of_logits = chunk.gradients(chunk.probabilities_from(log_normalisers_N[part]))
            gradients.add(part, of_logits.mul_(grad_N[part].unsqueeze(-1)))
        return gradients.h, *gradients.of_weights((weight_VD, bias_V, own_MD)), None, None


def capped_logits(h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, own_MD: Tensor | None, output: _Output) -> Tensor:
    """Return the logits [N, V/p] in h's format. Unlike the other functions of a head it holds those
    of all tokens, and autograd knows its backward."""
    bias_V = None if bias_V is None else bias_V.to(h_ND.dtype)
    logits_NV = linear(h_ND, weight_VD.to(h_ND.dtype), bias_V)
    if own_MD is not None and output.places_R is not None:
        own_RD = own_MD[: len(output.places_R)].to(h_ND.dtype)
        own_NR = linear(h_ND, own_RD, None if bias_V is None else bias_V[output.places_R])
        logits_NV = logits_NV.index_copy(1, output.places_R, own_NR)
    return logits_NV if output.softcap is None else soft_cap(logits_NV, output.softcap)


class VocabParallelHead(VocabularyMatrix):
    """The matrix W [V/p, D] of the logits, their bias [V/p], and the loss that goes with them.

    W is the head's own, borrowed from the embedding, or a copy of the embedding of the first
    pipeline stage (`tied_over` the ranks of both). From h [N, D], or this rank's tokens of it, and
    labels [N] (IGNORE if a position is no target) the head computes `loss_sum`, `token_losses` or
    `losses_and_hits`; without labels it computes `logits`. Each of them calls `forward` with the
    function to compute, because ZeRO-3 gathers the weight only when the module itself is called.

    `bias` is the name of its logical tensor, None if there is none. `bias_is_row`: that tensor is
    [1, V], not [V]. `softcap`: logits x become softcap · tanh(x / softcap).
    """

    bias: nn.Parameter | None

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
        super().__init__(tp)
        self.softcap = softcap
        self.vocab_size = vocab_size
        self.tied_to = (tied_to,)  # in a tuple: a module here would be listed as this one's child
        if tied_to is None:
            role = Role.MATRIX if tied_over is None else Role.EMBEDDING
            self.declare_weight(name, vocab_size, hidden_size, role, init, tied_over)
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

    def loss_sum(self, h_ND: Tensor, labels_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the loss summed over targets, an fp32 scalar, the same on every rank of the group.

        `smoothing`: the share of a label's weight that is divided evenly over the vocabulary.
        """
        loss: Tensor = self(h_ND, function=_CrossEntropySum.apply, more=(labels_N, smoothing))
        return loss

    def token_losses(self, h_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Return each token's own loss, fp32 [N], 0 if it is no target.

        It is for objectives that are not a plain sum over targets.
        """
        losses_N: Tensor = self(h_ND, function=_TokenLosses.apply, more=(labels_N,))
        return losses_N

    def losses_and_hits(self, h_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Return each token's loss, and 1 if its label has the highest logit, float64 [2, N].

        Both are 0 if the token is no target. They have no gradients.
        """
        found_2N: Tensor = self(h_ND, function=losses_and_hits, more=(labels_N,))
        return found_2N

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return this rank's logits [N, V/p], for sampling and oracles."""
        logits_NV: Tensor = self(h_ND, function=capped_logits)
        return logits_NV

    def forward(self, h_ND: Tensor, *, function: Callable[..., Tensor], more: tuple[Any, ...] = ()) -> Tensor:
        """Return the function of the whole h [N, D], the head's tensors, the rest of the head, and
        `more`, computed inside the tensor-parallel region."""
        whole_ND = self.tp.enter(h_ND)
        places_R = None if self.token_rows is None else self.lookup(h_ND.device)[: len(self.places)]
        output = _Output(self.vocab_size, self.tp.group, self.softcap, places_R)
        bias_V = None if self.bias is None else self.bias.flatten()
        return function(whole_ND, self.weight, bias_V, self.token_rows, output, *more)
