"""The last block of a network: what is made of the hidden states by each task.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of them), L of them that have
a label, D model, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from parallel.attention import Documents
from parallel.collectives import all_gather, reduce_from_group
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
    """norm(act(x Aᵀ + b)), [N, D] → [N, D] (Devlin et al. 2018, arXiv:1810.04805, in its code): between the tensor-parallel
    regions, so whole on every rank and of this rank's tokens."""

    def __init__(self, config: TransformerConfig, name: str, norm: str | None, tp: TensorParallel) -> None:
        super().__init__()
        D = config.hidden_size
        self.dense = ReplicatedLinear(D, D, name=name, init=Init(std=config.init_std), tp=tp)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config, norm, tp)

    def forward(self, x_ND: Tensor) -> Tensor:
        transformed_ND: Tensor = self.norm(self.activation(self.dense(x_ND)))
        return transformed_ND


Output = Literal["loss", "sums", "scores", "logits"]  # the methods of `Outputs`


class Outputs(Protocol):
    """What the last block gives of a micro-batch, from hidden states [N, D] or this rank's tokens of them."""

    def loss(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return the loss summed over the targets, with the statistics of a step behind it where the task's `Measures` has
        some."""

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return what the task's `Measures` reads of an evaluation, float64, the loss first; no gradients."""

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `document_scores`, float64 [2, R]; no gradients."""

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return this rank's logits [B, S, V/p]; of classes those of each token, [B, S, C]."""


class TokenObjective(Protocol):
    """What a task makes of the hidden states before the output layer over the vocabulary."""

    def loss(self, output: VocabParallelHead, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `Outputs.loss`."""

    def sums(self, output: VocabParallelHead, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `Outputs.sums`."""


class LabelObjective(Protocol):
    """What a task makes of the output for each document, fp32 or wider, and of the document's label."""

    def loss(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return the loss summed over the documents."""

    def statistics(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return what the task's `Measures` reads behind the loss, float64; no gradients."""


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of every label; `smoothing`: the share of its weight that is divided evenly over the vocabulary while
    training."""

    smoothing: float = 0.0

    def loss(self, output: VocabParallelHead, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return output.loss_sum(x_ND, batch.targets_BS.flatten(), smoothing=self.smoothing)

    def sums(self, output: VocabParallelHead, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return what `TokenMeasures` reads."""
        labels_N = batch.targets_BS.flatten()
        losses_N, is_hit_N = output.losses_and_hits(x_ND, labels_N)
        return token_sums(losses_N, is_hit_N, labels_N != IGNORE, batch.documents)


def document_scores(losses_N: Tensor, is_hit_N: Tensor, is_target_N: Tensor, documents: Documents) -> Tensor:
    """Of each document the log-probability of its targets, and 1 where each of them was the likeliest, float64 [2, R]."""
    is_miss_N = is_target_N & (is_hit_N == 0)
    return torch.stack([-documents.sums(losses_N.double()), (documents.sums(is_miss_N.long()) == 0).double()])


def token_sums(losses_N: Tensor, is_hit_N: Tensor, is_target_N: Tensor, documents: Documents) -> Tensor:
    """The loss, the targets that were guessed, the documents all of whose targets were, and those that have targets,
    float64 [4]. A document is guessed as a whole where the likeliest tokens, one after another, would write it: each then
    follows the right ones."""
    targets_R, hits_R = (documents.sums(marks_N.long()) for marks_N in (is_target_N, is_hit_N))
    is_answer_R = targets_R > 0
    is_exact_R = is_answer_R & (hits_R == targets_R)
    return torch.stack([part.sum().double() for part in (losses_N, is_hit_N, is_exact_R, is_answer_R)])


@dataclass(frozen=True)
class Classes:
    """Cross entropy of the class of each document; its statistics are those of `ClassMeasures`."""

    def loss(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        return cross_entropy(outputs_LC, labels_L, reduction="sum")

    def statistics(self, outputs_LC: Tensor, labels_L: Tensor) -> Tensor:
        """Return how often each class was named for each true one, row by row of the true class, [C²]; of many classes how
        often each was right, there and named, [3 C]. Of equal outputs the lowest class counts."""
        C, named_L = outputs_LC.shape[-1], outputs_LC.argmax(-1)
        if C <= PAIRED_CLASSES:
            return torch.bincount(labels_L * C + named_L, minlength=C**2).double()
        parts = (labels_L[labels_L == named_L], labels_L, named_L)
        return torch.cat([torch.bincount(part, minlength=C) for part in parts]).double()


@dataclass(frozen=True)
class Objective:
    """What a task minimises. A head over the vocabulary reads `of_tokens`, one over documents `of_labels`."""

    of_tokens: TokenObjective = field(default_factory=NextToken)
    of_labels: LabelObjective = field(default_factory=Classes)


class Head(nn.Module):
    """Final norm or transform, logits and loss; where the head is scaled, of hidden states / √D."""

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
        return self.objective.loss(self.output, self._before_output(x_ND, batch), batch)

    def sums(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        return self.objective.sums(self.output, self._before_output(x_ND, batch), batch)

    def scores(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        labels_N = batch.targets_BS.flatten()
        losses_N, is_hit_N = self.output.losses_and_hits(self._before_output(x_ND, batch), labels_N)
        return document_scores(losses_N, is_hit_N, labels_N != IGNORE, batch.documents)

    def logits(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        logits_BSV: Tensor = self.output.logits(self._before_output(x_ND, batch)).unflatten(0, batch.documents.shape)
        return logits_BSV

    def _before_output(self, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        x_ND = self.transform(self.dropout(self.norm(x_ND), batch.documents, batch.streams))
        return x_ND * self.scale if self.scale != 1.0 else x_ND


class LabelHead(nn.Module):
    """Final norm, then one output for each class, at one token of each document: that with the label.

    As in transformers' …ForSequenceClassification: a decoder's `score` of its last token, Bert's tanh pooler and classifier of
    its first. The head is whole on every rank. With sequence parallelism each rank has the documents whose token it has, so
    that its gradient is partial, and losses are summed over the ranks.
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
        """Return the outputs [L, C], fp32 or wider, and the labels [L] of the documents whose token this rank has."""
        labels_N = batch.targets_BS.flatten()[self.tp.tokens(batch.targets_BS.numel())]
        chosen = (labels_N != IGNORE).nonzero().squeeze(-1)
        pooled_LD = self.dropout(self._pooled(self.norm(x_ND)[chosen]), batch.documents, batch.streams, chosen)
        outputs_LC = self.classifier(pooled_LD)
        return outputs_LC.to(torch.promote_types(outputs_LC.dtype, torch.float32)), labels_N[chosen]

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return reduce_from_group(sums, self.tp.group) if self.tp.sequence else sums

    def _pooled(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.pooler is None else self.pooler(x_ND).tanh()
