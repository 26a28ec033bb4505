"""Smoothed labels against torch's cross entropy; over tensor ranks with a padded vocabulary they are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel import loss
from parallel.documents import Documents
from parallel.loss import IGNORE, VocabParallelHead
from parallel.mesh import Mesh
from parallel.params import Init, initialise
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.model.objective import objective_of
from trainer.schema import Recipe

N, D, V = 21, 6, 11  # no degree divides V: of three ranks the last has a row of padding
SMOOTHING = 0.2


def drawn() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=stream).masked_fill(torch.arange(N) % 4 == 0, IGNORE)
    return torch.randn(N, D, generator=stream, dtype=torch.float64), labels


def head_of(tp: TensorParallel, softcap: float | None) -> VocabParallelHead:
    head = VocabParallelHead(V, D, name="head", init=Init(std=0.5), tp=tp, bias="bias", softcap=softcap)
    initialise(head, seed=0)
    return head.double()


def smoothed(tp: TensorParallel, softcap: float | None) -> list[Tensor]:
    """Loss, gradient of the input, and this rank's gradients of weight and bias."""
    (h, labels), head = drawn(), head_of(tp, softcap)
    h.requires_grad_()
    value = head.loss_sum(h, labels, smoothing=SMOOTHING)
    (value / 7).backward()
    assert h.grad is not None
    return [value.detach(), h.grad, *(parameter.grad for parameter in head.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_it_is_torchs(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * 5)  # several chunks, the last one smaller
    monkeypatch.setattr(loss, "TOKENS_PER_FEATURE", 0)
    got = smoothed(TensorParallel.alone(), softcap)
    (h, labels), head = drawn(), head_of(TensorParallel.alone(), softcap)
    h.requires_grad_()
    value = functional.cross_entropy(head.logits(h), labels, ignore_index=IGNORE, label_smoothing=SMOOTHING, reduction="sum")
    (value / 7).backward()
    for one, other in zip(got, [value.detach(), h.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_measured_is_not_smoothed() -> None:
    (h, labels), head = drawn(), head_of(TensorParallel.alone(), None)
    with torch.no_grad():
        plain = functional.cross_entropy(head.logits(h), labels, ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(head.losses_and_hits(h, labels)[0].sum(), plain)


def test_a_recipe_smooths_what_is_minimised_and_not_what_is_measured() -> None:
    minimised = objective_of(Recipe.model_validate({"train": {"label_smoothing": SMOOTHING}})).of_tokens
    (h, labels), head = drawn(), head_of(TensorParallel.alone(), None)
    batch = MicroBatch(labels, Documents.whole_rows(3, 7), labels.view(3, 7))
    with torch.no_grad():
        assert minimised.loss(head, h, batch) == head.loss_sum(h, labels, smoothing=SMOOTHING)
        torch.testing.assert_close(minimised.sums(head, h, batch)[0], head.loss_sum(h, labels))


def on_ranks(mesh: Mesh) -> list[Tensor]:
    value, grad_h, grad_w, grad_b = smoothed(TensorParallel(mesh.tp, sequence=False), None)
    return [value, grad_h, grad_w, grad_b]


def test_tensor_ranks_equal_one() -> None:
    expected = smoothed(TensorParallel.alone(), None)
    ranks = spawn(on_ranks, Layout(tp=3))
    for got in ranks:
        for one, other in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-12, atol=1e-12)
    for index in (2, 3):
        whole = torch.cat([torch.as_tensor(got[index]) for got in ranks])
        torch.testing.assert_close(whole[:V], expected[index], rtol=1e-12, atol=1e-12)
        assert not whole[V:].any(), "padding has no gradient"
