"""The pair losses against their papers' formulas, written out in plain numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.documents import Documents
from parallel.loss import IGNORE
from trainer.data.loader import MicroBatch
from trainer.model.preference_losses import LOSSES, Answers, Pairs, sums_over_pairs
from trainer.schema import Preference

CHOSEN, REJECTED = (-12.5, -3.0, -40.0), (-11.0, -9.5, -40.5)  # log-probabilities of three pairs' answers
REFERENCE = ((-13.0, -10.0), (-4.5, -8.0), (-41.0, -44.0))
NUM_TARGETS = ((5, 4), (3, 7), (20, 28))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_formula(keys: Preference, pair: int) -> tuple[float, float, float]:
    """(loss, reward of the chosen answer, of the rejected one)."""
    chosen, rejected = CHOSEN[pair], REJECTED[pair]
    (of_chosen, of_rejected), (num_chosen, num_rejected) = REFERENCE[pair], NUM_TARGETS[pair]
    rewards = keys.beta * (chosen - of_chosen), keys.beta * (rejected - of_rejected)
    if keys.loss == "dpo":
        right, wrong = sigmoid(rewards[0] - rewards[1]), sigmoid(rewards[1] - rewards[0])
        return -(1 - keys.label_smoothing) * math.log(right) - keys.label_smoothing * math.log(wrong), *rewards
    if keys.loss == "ipo":
        risen = (chosen - of_chosen) / num_chosen - (rejected - of_rejected) / num_rejected
        return (risen - 1 / (2 * keys.beta)) ** 2, *rewards
    means = chosen / num_chosen, rejected / num_rejected
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
    loss = -means[0] - keys.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    return loss, keys.beta * means[0], keys.beta * means[1]


def answers(reference: bool = True) -> Answers:
    log_probs = torch.tensor([CHOSEN, REJECTED], dtype=torch.float64).T.contiguous().requires_grad_()
    given = torch.tensor(REFERENCE, dtype=torch.float64) if reference else None
    return Answers(log_probs, torch.tensor(NUM_TARGETS), given)


CASES = {
    "dpo": {"loss": "dpo", "beta": 0.3},
    "dpo-smoothed": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.25},
    "orpo": {"loss": "orpo", "beta": 0.4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_that_of_its_formula(name: str) -> None:
    keys = Preference.model_validate(CASES[name])
    given = answers(reference=keys.needs_reference)
    losses, rewards = LOSSES[keys.loss](given, keys)
    expected = torch.tensor([by_formula(keys, pair) for pair in range(3)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([losses, *rewards.T], 1), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[keys.loss](Answers(x, given.num_targets_P2, given.reference_P2), keys).losses_P, given.log_probs_P2
    )
    sums = sums_over_pairs(given, keys)
    accuracy = (expected[:, 1] > expected[:, 2]).sum()
    assert 0 < accuracy < 3
    assert sums.tolist() == pytest.approx([*expected.sum(0).tolist(), int(accuracy)], rel=1e-12)


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    log_probs = torch.tensor([[0.0, -3.0]], requires_grad=True)
    loss = LOSSES["orpo"](Answers(log_probs, torch.tensor([[2, 2]]), None), Preference(loss="orpo")).losses_P.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_probs.grad).all()


def test_pairs_are_told_from_what_fills_a_row_up() -> None:
    """Rows of two pairs, of one and filler, of filler alone."""
    documents = Documents(((2, 1, 3, 2), (3, 4, 1), (8,)))
    labels = torch.arange(24).reshape(3, 8)
    labels[0, 3] = labels[1, 0] = labels[1, 1] = IGNORE
    log_probs = documents.sums(-torch.arange(24.0))
    assert log_probs.tolist() == [-1, -2, -12, -13, -27, -50, -15, -156]
    found = Answers.of_documents(log_probs, labels, documents, torch.arange(8.0))
    assert found.log_probs_P2.tolist() == [[-1, -2], [-12, -13], [-27, -50]]
    assert found.num_targets_P2.tolist() == [[2, 1], [2, 2], [1, 4]]
    assert found.reference_P2 is not None
    assert found.reference_P2.tolist() == [[0, 1], [2, 3], [4, 5]]
    nothing = Answers.of_documents(log_probs[-1:], labels[2:], Documents(((8,),)), None)
    assert sums_over_pairs(nothing, Preference(loss="orpo")).tolist() == [0.0] * 4


def test_a_pair_that_is_tied_is_not_in_order() -> None:
    """As nothing is before the first step of a model that is its own reference."""
    tied = Answers(torch.full((1, 2), -3.0), torch.tensor([[2, 2]]), torch.full((1, 2), -3.0))
    assert sums_over_pairs(tied, Preference()).tolist()[1:] == [0.0, 0.0, 0.0]


def test_a_long_answers_log_probability_keeps_what_each_token_adds() -> None:
    """fp32 holds 4096 in steps of 0.0005: a sum in it would lose a token of 0.0001."""
    losses = torch.tensor([4096.0, 1e-4, 4096.0, 0.0])
    documents, labels = Documents(((2, 2),)), torch.ones(1, 4, dtype=torch.int64)
    reference = torch.full((2,), -4096.0, dtype=torch.float64)
    head: Any = SimpleNamespace(token_losses=lambda *_: losses)
    batch = MicroBatch(labels, documents, labels, reference)
    _, chosen, rejected, _ = Pairs(Preference(beta=1.0)).loss(head, torch.empty(4, 1), batch).tolist()
    assert (chosen, rejected) == (pytest.approx(-1e-4, rel=1e-6), 0.0)
