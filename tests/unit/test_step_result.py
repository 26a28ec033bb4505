"""A step's numbers stay on the device until one is asked for, and then come with all that wait."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.engine.step_result import MOST_UNREAD, StepResult


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of tensors that are brought to the host as lists: the form in which results are read."""
    seen: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (seen.append(tensor.numel()), tolist(tensor))[1])
    return seen


def result(loss: float, unread: list[StepResult]) -> StepResult:
    means = torch.tensor([loss, 0.5], dtype=torch.float64)
    return StepResult(means, 7, torch.tensor(2.0), 1.0, record=lambda means: {"accuracy": means[0]}, unread=unread)


def test_one_transfer_brings_the_numbers_of_all_steps_that_wait(transfers: list[int]) -> None:
    unread: list[StepResult] = []
    first, second = result(3.0, unread), result(4.0, unread)
    assert not transfers
    assert (second.loss, second.num_targets, second.grad_norm, second.statistics) == (4.0, 7, 2.0, {"accuracy": 0.5})
    assert first.loss == 3.0
    assert transfers == [8]
    assert unread == []


def test_results_that_nobody_asks_for_are_read_in_time(transfers: list[int]) -> None:
    unread: list[StepResult] = []
    for step in range(MOST_UNREAD + 1):
        result(float(step), unread)
    assert (transfers, len(unread)) == ([4 * MOST_UNREAD], 1)


def test_a_norm_that_is_no_number_is_infinite() -> None:
    assert StepResult(torch.zeros(1, dtype=torch.float64), 1, torch.tensor(math.nan), 1.0).grad_norm == math.inf
