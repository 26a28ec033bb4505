"""Products of matrices by oneDNN beside torch's own: numbers, gradients, and who takes which."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from parallel import products

CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # fp32, 200 terms of size 1 summed in another order


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have every fp32 product taken by oneDNN, and return the shapes of those that were."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    shapes: list[tuple[int, ...]] = []
    call = products.by_onednn
    monkeypatch.setattr(products, "mkl_lacks_avx512", lambda: True)
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "by_onednn", lambda x, *rest: shapes.append(tuple(x.shape)) or call(x, *rest))
    return shapes


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_products_of_views_are_torchs(by_onednn: list[tuple[int, ...]], transposed: tuple[bool, bool]) -> None:
    a = torch.randn(200, 33).t() if transposed[0] else torch.randn(33, 200)
    b = torch.randn(17, 200).t() if transposed[1] else torch.randn(200, 17)
    into = torch.randn(33, 17)
    torch.testing.assert_close(products.product(a, b), a @ b, **CLOSE)
    torch.testing.assert_close(products.add_product(into.clone(), a, b), torch.addmm(into, a, b), **CLOSE)
    assert by_onednn == [(33, 200)] * 2


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_are_torchs(by_onednn: list[tuple[int, ...]], bias: bool) -> None:
    x, weight = torch.randn(33, 200, requires_grad=True), torch.randn(17, 200, requires_grad=True)
    given = [x, weight, *([torch.randn(17, requires_grad=True)] if bias else [])]
    grad = torch.randn(33, 17)
    ours, theirs = products.linear(*given), functional.linear(*given)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert by_onednn == [(33, 200)]
    for mine, other in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, given, grad), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    assert len(by_onednn) == 3


def test_what_is_frozen_gets_no_product(by_onednn: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(33, 200, requires_grad=True), torch.randn(17, 200)
    products.linear(x, weight).sum().backward()
    assert by_onednn == [(33, 200), (33, 17)]


def test_only_large_fp32_products_on_other_processors_than_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    large = products.SMALL
    monkeypatch.setattr(products, "mkl_lacks_avx512", lambda: True)
    assert products.takes_onednn(torch.ones(1), large)
    assert not products.takes_onednn(torch.ones(1), large - 1)
    assert not products.takes_onednn(torch.ones(1, dtype=torch.bfloat16), large)
    assert not products.takes_onednn(torch.ones(1, dtype=torch.float64), large)
    assert not products.takes_onednn(torch.ones(1, device="meta"), large)
    monkeypatch.setattr(products, "mkl_lacks_avx512", lambda: False)
    assert not products.takes_onednn(torch.ones(1), large)


@pytest.mark.parametrize(
    ("vendor", "capability", "lacks"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("HygonGenuine", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_the_processor_tells_which_library_is_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, capability: str, lacks: bool
) -> None:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("torch has one library here")
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.mkl_lacks_avx512.__wrapped__() is lacks
