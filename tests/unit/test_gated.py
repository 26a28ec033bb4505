"""The gated feed-forward's own backward: the numbers of autograd to the bit, with less kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.mlp import ACTIVATIONS, _Gated

N, F = 6, 10


def kept_and_gradient(product: Tensor, h_NF: Tensor, kept: list[Tensor]) -> tuple[int, Tensor]:
    """The elements that are kept beside the input, and the gradient of the input."""
    product.backward(torch.linspace(-1, 1, N * F).view(N, F).to(h_NF.dtype))
    assert h_NF.grad is not None
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    storages.pop(h_NF.untyped_storage().data_ptr())
    return sum(storages.values()), h_NF.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_autograd_to_the_bit_and_keeps_its_input_alone(name: str, dtype: torch.dtype) -> None:
    activation = ACTIVATIONS[name]
    values = torch.randn(N, 2 * F, generator=torch.Generator().manual_seed(0)).to(dtype)
    outcomes = []
    for written_out in (True, False):
        kept: list[Tensor] = []
        h_NF = values.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda saved: saved
        ):
            gate_NF, up_NF = h_NF.chunk(2, dim=-1)
            product = _Gated.apply(h_NF, activation) if written_out else activation.forward(gate_NF) * up_NF
        outcomes.append((product.detach(), *kept_and_gradient(product, h_NF, kept)))
    (ours, beside, gradient), (theirs, theirs_beside, their_gradient) = outcomes
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient, their_gradient)
    assert (beside, theirs_beside) == (0, N * F)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    h_NF = torch.randn(N, 2 * F, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: _Gated.apply(h, ACTIVATIONS[name]), h_NF)
