"""Losses of preference pairs, from the log-probabilities of their answers.

Shape letters: N tokens of a micro-batch, R documents in it, P pairs; a last dimension of 2 is
(chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from parallel.documents import Documents
from parallel.loss import IGNORE
from trainer import schema
from trainer.data.loader import MicroBatch
from trainer.model.heads import TokenLosses


@dataclass(frozen=True)
class Answers:
    """The two answers to each of P prompts. `reference_P2`: their log-probabilities before
    training, where the loss needs them."""

    log_probs_P2: Tensor  # of the answer: the sum over its tokens
    num_targets_P2: Tensor  # tokens of the answer
    reference_P2: Tensor | None

    @classmethod
    def of_documents(cls, log_probs_R: Tensor, labels_BS: Tensor, documents: Documents, reference_R: Tensor | None) -> Answers:
        """Return the answers. Each row has the chosen and the rejected answer of a pair, then those
        of the next pair; filler may follow."""
        num_targets_R = documents.sums((labels_BS != IGNORE).flatten())
        pairs_P2 = _pairs(documents).to(log_probs_R.device)
        reference_P2 = None if reference_R is None else reference_R[pairs_P2]
        return cls(log_probs_R[pairs_P2], num_targets_R[pairs_P2], reference_P2)

    @property
    def mean_log_probs_P2(self) -> Tensor:
        return self.log_probs_P2 / self.num_targets_P2

    @property
    def log_ratios_P2(self) -> Tensor:
        """The log-probabilities of the answers, less those before training."""
        assert self.reference_P2 is not None
        return self.log_probs_P2 - self.reference_P2


class PairLosses(NamedTuple):
    """The loss of each pair. `rewards_P2`: the rewards of the answers with the model as a reward
    model, without gradient."""

    losses_P: Tensor
    rewards_P2: Tensor


def dpo(answers: Answers, keys: schema.Preference) -> PairLosses:
    """Return −(1 − ε) log σ(m) − ε log σ(−m), the loss of DPO.

    m is β times how much more the chosen answer's log-probability rose than the other's (Rafailov
    et al. 2023, arXiv:2305.18290, equation 7). ε is the share of pairs whose answers are assumed to
    be swapped (Mitchell 2023, "A note on DPO with noisy preferences", equation 3).
    """
    rewards_P2 = keys.beta * answers.log_ratios_P2
    margins_P = _margins(rewards_P2)
    right_P, wrong_P = functional.logsigmoid(margins_P), functional.logsigmoid(-margins_P)
    return PairLosses(-(1 - keys.label_smoothing) * right_P - keys.label_smoothing * wrong_P, rewards_P2.detach())


def ipo(answers: Answers, keys: schema.Preference) -> PairLosses:
    """Return (m − 1 / 2β)², the loss of IPO.

    m is how much more the chosen answer's mean log-probability rose (Azar et al. 2023,
    arXiv:2310.12036, equation 17, with means over the tokens in place of sums, as its authors
    confirmed to Hugging Face).
    """
    margins_P = _margins(answers.log_ratios_P2 / answers.num_targets_P2)
    return PairLosses((margins_P - 1 / (2 * keys.beta)).square(), keys.beta * answers.log_ratios_P2.detach())


def orpo(answers: Answers, keys: schema.Preference) -> PairLosses:
    """Return −p − β log σ(log odds(p) − log odds(q)), the loss of ORPO.

    p and q are the mean log-probabilities of the chosen and the rejected answer, and log odds(p) =
    p − log(1 − eᵖ) (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7; β is their λ).
    """
    means_P2 = answers.mean_log_probs_P2
    margins_P = _margins(means_P2 - _log1mexp(means_P2))
    losses_P = -means_P2[:, 0] - keys.beta * functional.logsigmoid(margins_P)
    return PairLosses(losses_P, keys.beta * means_P2.detach())


LOSSES: dict[str, Callable[[Answers, schema.Preference], PairLosses]] = {"dpo": dpo, "ipo": ipo, "orpo": orpo}


@dataclass(frozen=True)
class Pairs:
    """The objective of pairs, whose statistics `PairMeasures` reads, in training as in an
    evaluation."""

    keys: schema.Preference

    def loss(self, output: TokenLosses, x_ND: Tensor, batch: MicroBatch) -> Tensor:
        """Return `sums_over_pairs`. Sums over hundreds of tokens are taken in float64, because the
        model learns from their differences."""
        losses_N = output.token_losses(x_ND, batch.targets_BS.flatten())
        log_probs_R = -batch.documents.sums(losses_N.double())
        answers = Answers.of_documents(log_probs_R, batch.targets_BS, batch.documents, batch.reference_R)
        return sums_over_pairs(answers, self.keys)

    sums = loss


def sums_over_pairs(answers: Answers, keys: schema.Preference) -> Tensor:
    """Return four sums over the pairs, [4]: the loss, with gradient, the rewards of chosen and of
    rejected answers, and the pairs in which the chosen answer has the higher one."""
    losses_P, rewards_P2 = LOSSES[keys.loss](answers, keys)
    is_right_P = rewards_P2[:, 0] > rewards_P2[:, 1]
    sums = (losses_P.sum(), *rewards_P2.sum(0), is_right_P.sum())
    return torch.stack([part.to(losses_P.dtype) for part in sums])


def _pairs(documents: Documents) -> Tensor:
    """Return the numbers of the documents that are the answers of each pair, int64 [P, 2]."""
    firsts = accumulate((len(row) for row in documents.lengths), initial=0)
    answers = [first + n for first, row in zip(firsts, documents.lengths, strict=False) for n in range(len(row) // 2 * 2)]
    return torch.tensor(answers, dtype=torch.int64).reshape(-1, 2)


def _margins(scores_P2: Tensor) -> Tensor:
    return scores_P2[:, 0] - scores_P2[:, 1]


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x < 0. An answer of probability 1 counts as the largest below 1, so
    that its odds are finite."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))
