"""`precision.matmul`: fp32 products are exact unless the recipe asks for TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trainer.engine.deepspeed_start import set_matmul_format
from trainer.schema import Precision

TF32 = Precision(matmul="tf32")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_each_start_sets_the_format_anew() -> None:
    set_matmul_format(TF32)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert set_matmul_format(Precision()) == []
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have TF32")
def test_a_machine_without_tf32_is_told() -> None:
    assert set_matmul_format(TF32) == ["precision.matmul tf32: the devices here have no TF32; fp32 products stay exact"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_rounds_the_factors_to_10_bits_and_exact_does_not() -> None:
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    truth = a.double() @ b.double()

    def error() -> float:
        return float(((a.cuda() @ b.cuda()).cpu().double() - truth).norm() / truth.norm())

    set_matmul_format(Precision())
    assert error() < 1e-6, "fp32 has 24 bits: 6e-8 each"
    assert set_matmul_format(TF32) == []
    assert 1e-5 < error() < 1e-3, "10 bits and a hidden one: 5e-4 each at most, which mostly cancel"
