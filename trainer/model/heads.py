"""The last block of a network: the loss, statistics and logits that each task computes from the
hidden states.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), L of them that have a label, D model, V vocabulary, C classes, R documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from parallel.autograd import TensorFunction
from parallel.collectives import all_gather, reduce_from_group
from parallel.documents import Documents
from parallel.embedding import VocabParallelEmbedding
from parallel.linear import ReplicatedLinear
from parallel.loss import IGNORE, VocabParallelHead
from parallel.mesh import Group
from parallel.mlp import ACTIVATIONS
from parallel.params import Init
from parallel.tensor import TensorParallel
from trainer.data.loader import MicroBatch
from trainer.model.config import PAIRED_CLASSES, TransformerConfig
from trainer.model.names import names_of
from trainer.model.pieces import Dropout, final_dropout, make_norm, matrix_init


class HeadTransform(nn.Module):
    """The transform norm(act(x Aᵀ + b)), [N, D] → [N, D] (Devlin et al. 2018, arXiv:1810.04805, in
    its code).

    It is between the tensor-parallel regions, so every rank has its whole weight and applies it to
    its own tokens.
    """

    def __init__(self, config: TransformerConfig, name: str, norm: str | None, tp: TensorParallel) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense = ReplicatedLinear(D, D, name=name, init=Init(std=config.init_std), tp=tp)
        self.activation = ACTIVATIONS[config.activation].forward
        self.norm = make_norm(config, norm, tp)

    def forward(self, x_ND: Tensor) -> Tensor:
        transformed_ND: Tensor = self.norm(self.activation(self.dense(x_ND)))
        return transformed_ND


Output = Literal["loss", "sums", "scores", "logits"]  # the methods of `Outputs`


class Outputs(Protocol):
    """The outputs of the last block for a micro-batch, from hidden states [N, D] or this rank's
    tokens of them."""

    def loss(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return the loss summed over the targets, followed by the statistics of a step where the
        task's `Measures` has some."""

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return the sums that the task's `Measures` reads of an evaluation, float64, the loss
        first. No gradients."""

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `document_scores`, float64 [2, R]. No gradients."""

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return this rank's logits [B, S, V/p], or of classes those of each token, [B, S, C]."""


class TokenLosses(Protocol):
    """The losses of a head over the vocabulary; see `VocabParallelHead`."""

    def loss_sum(self, h_ND: Tensor, labels_N: Tensor, *, smoothing: float = 0.0) -> Tensor: ...

    def token_losses(self, h_ND: Tensor, labels_N: Tensor) -> Tensor: ...

    def losses_and_hits(self, h_ND: Tensor, labels_N: Tensor) -> Tensor: ...


class OfTargets:
    """A head that computes only the targets, at `places_L` of the labels: its hidden states are
    theirs, [L, D].

    Labels are those of all tokens, and so are results by token, because the loss of a token that is
    no target is 0.
    """

    def __init__(self, output: VocabParallelHead, places_L: Tensor) -> None:
        self._output, self._places_L = output, places_L

    def loss_sum(self, h_ND: Tensor, labels_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        return self._output.loss_sum(h_ND, labels_N[self._places_L], smoothing=smoothing)

    def token_losses(self, h_ND: Tensor, labels_N: Tensor) -> Tensor:
        losses_L = self._output.token_losses(h_ND, labels_N[self._places_L])
        return losses_L.new_zeros(labels_N.shape).index_copy(0, self._places_L, losses_L)

    def losses_and_hits(self, h_ND: Tensor, labels_N: Tensor) -> Tensor:
        found_2L = self._output.losses_and_hits(h_ND, labels_N[self._places_L])
        return found_2L.new_zeros((2, *labels_N.shape)).index_copy(1, self._places_L, found_2L)


class _Chosen(TensorFunction):
    """The rows of X [N, D] at `places_L`, no place twice → [L, D]. Backward puts their gradients
    back, with 0 elsewhere; autograd's own would add them up."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, places_L: Tensor) -> Tensor:
        ctx.save_for_backward(places_L)
        ctx.shape = x_ND.shape
        return x_ND.index_select(0, places_L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LD: Tensor) -> tuple[Tensor, None]:
        (places_L,) = ctx.saved_tensors
        return grad_LD.new_zeros(ctx.shape).index_copy_(0, places_L, grad_LD), None


class TokenObjective(Protocol):
    """A task's loss and statistics, from the hidden states before a head over the vocabulary."""

    def loss(self, output: TokenLosses, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `Outputs.loss`."""

    def sums(self, output: TokenLosses, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `Outputs.sums`."""


class LabelObjective(Protocol):
    """A task's loss and statistics, from the output for each document, fp32 or wider, and from the
    document's label."""

    def loss(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return the loss summed over the documents."""

    def statistics(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return what stands behind the loss for the task's `Measures`, float64. No gradients."""


@dataclass(frozen=True)
class NextToken:
    """The cross entropy of every label. `smoothing`: the share of its weight that is spread evenly
    over the vocabulary in training."""

    smoothing: float = 0.0

    def loss(self, output: TokenLosses, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return output.loss_sum(x_ND, batch.targets_BS.flatten(), smoothing=self.smoothing)

    def sums(self, output: TokenLosses, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return the sums that `TokenMeasures` reads."""
        labels_N = batch.targets_BS.flatten()
        losses_N, is_hit_N = output.losses_and_hits(x_ND, labels_N)
        return token_sums(losses_N, is_hit_N, labels_N != IGNORE, batch.documents)


def document_scores(losses_N: Tensor, is_hit_N: Tensor, is_target_N: Tensor, documents: Documents) -> Tensor:
    """Return two numbers for each document, float64 [2, R]: the log-probability of its targets, and
    1 where each target was the likeliest token."""
    is_miss_N = is_target_N & (is_hit_N == 0)
    return torch.stack([-documents.sums(losses_N.double()), (documents.sums(is_miss_N.long()) == 0).double()])


def token_sums(losses_N: Tensor, is_hit_N: Tensor, is_target_N: Tensor, documents: Documents) -> Tensor:
    """Return four sums, float64 [4]: the loss, the targets that were predicted, the documents whose
    targets were all predicted, and the documents that have targets.

    A document is predicted as a whole where writing the likeliest token again and again would
    produce it: each prediction then follows the right tokens.
    """
    targets_R, hits_R = (documents.sums(marks_N.long()) for marks_N in (is_target_N, is_hit_N))
    is_answer_R = targets_R > 0
    is_exact_R = is_answer_R & (hits_R == targets_R)
    return torch.stack([part.sum().double() for part in (losses_N, is_hit_N, is_exact_R, is_answer_R)])


@dataclass(frozen=True)
class Classes:
    """The cross entropy of the class of each document, with the statistics of `ClassMeasures`."""

    def loss(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        return cross_entropy(outputs_LC, labels_L, reduction="sum")

    def statistics(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return the counts of pairs, a row for each true class, [C²]; for many classes the numbers
        of right predictions, texts and predictions of each, [3 C]. Of equal outputs the lowest
        class is predicted."""
        C, named_L = outputs_LC.shape[-1], outputs_LC.argmax(-1)
        if C <= PAIRED_CLASSES:
            return torch.bincount(labels_L * C + named_L, minlength=C**2).double()
        parts = (labels_L[labels_L == named_L], labels_L, named_L)
        return torch.cat([torch.bincount(part, minlength=C) for part in parts]).double()


@dataclass(frozen=True)
class Objective:
    """The objective of a task. A head over the vocabulary reads `of_tokens`, one over documents
    `of_labels`."""

    of_tokens: TokenObjective = field(default_factory=NextToken)
    of_labels: LabelObjective = field(default_factory=Classes)


class Head(nn.Module):
    """The final norm or transform, logits and loss. Where the head is scaled, hidden states are
    divided by √D."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        tp: TensorParallel,
        tied_to: VocabParallelEmbedding | None,
        tied_over: Group | None,
        objective: TokenObjective,
    ) -> None:
        super().__init__()
        names = names_of(config)
        self.tp = tp
        self.objective = objective
        self.norm = make_norm(config, names.final_norm, tp)
        self.dropout = final_dropout(config, names, tp)
        self.scale = config.hidden_size**-0.5 if config.scaled_head else 1.0
        self.transform: nn.Module = nn.Identity()
        if names.head_transform is not None:
            self.transform = HeadTransform(config, names.head_transform, names.head_transform_norm, tp)
        self.output = VocabParallelHead(
            config.vocab_size,
            config.hidden_size,
            name=names.embedding if config.tied_head else names.head,
            init=Init(std=config.init_std) if config.tied_head else matrix_init(config, config.hidden_size),
            tp=tp,
            tied_to=tied_to,
            tied_over=tied_over,
            bias=names.head_bias,
            bias_is_row=names.head_bias_is_row,
            softcap=config.logit_softcap,
        )

    def loss(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.objective.loss(*self._of_targets(x_ND, batch), batch)

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.objective.sums(*self._of_targets(x_ND, batch), batch)

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        labels_N = batch.targets_BS.flatten()
        output, x_ND = self._of_targets(x_ND, batch)
        losses_N, is_hit_N = output.losses_and_hits(x_ND, labels_N)
        return document_scores(losses_N, is_hit_N, labels_N != IGNORE, batch.documents)

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        logits_BSV: Tensor = self.output.logits(self._before_output(x_ND, batch, None)).unflatten(0, batch.documents.shape)
        return logits_BSV

    def _of_targets(self, x_ND: Tensor, batch: MicroBatch) -> tuple[TokenLosses, Tensor]:
        """Return the head and the hidden states before it: those of the targets where that spares
        others, and where this rank has them all."""
        if batch.places_L is None or self.tp.sequence:
            return self.output, self._before_output(x_ND, batch, None)
        chosen_LD = _Chosen.apply(x_ND, batch.places_L)
        return OfTargets(self.output, batch.places_L), self._before_output(chosen_LD, batch, batch.places_L)

    def _before_output(self, x_ND: Tensor, batch: MicroBatch, chosen: Tensor | None) -> Tensor:
        x_ND = self.transform(self.dropout(self.norm(x_ND), batch.documents, batch.streams, chosen))
        return x_ND * self.scale if self.scale != 1.0 else x_ND


class LabelHead(nn.Module):
    """The final norm, then one output for each class, at one token of each document: the one that
    has the label.

    As in transformers' …ForSequenceClassification, a decoder has `score` at its last token, Bert
    its tanh pooler and classifier at its first. The head is whole on every rank. With sequence
    parallelism each rank has the documents whose labelled token it has, so that its gradient is
    partial, and losses are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, *, tp: TensorParallel, objective: LabelObjective) -> None:
        super().__init__()
        names, D, init = names_of(config), config.hidden_size, Init(std=config.init_std)
        self.tp = tp
        self.objective = objective
        self.norm = make_norm(config, names.final_norm, tp)
        pools = names.pooler is not None
        self.pooler = ReplicatedLinear(D, D, name=names.pooler, init=init, tp=tp) if names.pooler is not None else None
        rate = config.residual_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = Dropout(rate if pools else 0.0, names.classifier, tp)
        self.classifier = ReplicatedLinear(D, len(config.classes), name=names.classifier, init=init, tp=tp, bias=pools)

    def loss(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return the loss summed over the documents."""
        return self._over_ranks(self.objective.loss(*self._of_documents(x_ND, batch)))

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        outputs_LC, labels_L = self._of_documents(x_ND, batch)
        loss = self.objective.loss(outputs_LC, labels_L).double()
        return self._over_ranks(torch.cat([loss[None], self.objective.statistics(outputs_LC, labels_L)]))

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        raise NotImplementedError("documents have classes here, and no tokens to be likely")

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        logits_NC = self.classifier(self._pooled(self.norm(x_ND)))
        whole_NC = all_gather(logits_NC, self.tp.group) if self.tp.sequence else logits_NC
        logits_BSC: Tensor = whole_NC.unflatten(0, batch.documents.shape)
        return logits_BSC

    def _of_documents(self, x_ND: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the outputs [L, C], fp32 or wider, and the labels [L] of the documents whose token
        this rank has."""
        labels_N = batch.targets_BS.flatten()[self.tp.tokens(batch.targets_BS.numel())]
        chosen = (labels_N != IGNORE).nonzero().squeeze(-1)
        pooled_LD = self.dropout(self._pooled(self.norm(x_ND)[chosen]), batch.documents, batch.streams, chosen)
        outputs_LC = self.classifier(pooled_LD)
        return outputs_LC.to(torch.promote_types(outputs_LC.dtype, torch.float32)), labels_N[chosen]

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return reduce_from_group(sums, self.tp.group) if self.tp.sequence else sums

    def _pooled(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.pooler is None else self.pooler(x_ND).tanh()
