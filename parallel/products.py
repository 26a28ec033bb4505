"""Matrix products by the faster of the two libraries that torch has on x86 processors.

torch gives fp32 products to MKL, which on processors that are not Intel's takes its AVX2 code: 110
GFLOP/s on a core of a Zen 5. oneDNN, to which torch gives bf16 products, takes AVX-512: 235
GFLOP/s, in the same format, summed in another order. The choice hangs on the processor and the
shape alone, never on a measurement: a run that goes on must multiply as it did before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.autograd import TensorFunction

# Multiplications below which MKL is faster: a call of oneDNN costs 10 µs more.
SMALL = 1 << 21


@cache
def mkl_lacks_avx512() -> bool:
    """Return whether oneDNN multiplies fp32 matrices with wider instructions here than MKL."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("GenuineIntel", None)


def _vendor() -> str | None:
    """Return the maker of the processor as it names itself; None where the kernel does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def takes_onednn(like: Tensor, multiplications: int) -> bool:
    """Return whether products of tensors like this one, with so many multiplications each, are
    left to oneDNN."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and multiplications >= SMALL and mkl_lacks_avx512()


def by_onednn(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return X Wᵀ + b [N, O] from oneDNN; both may be transposed views. It has no gradient."""
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return y_NO


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return A B [M, N]; both may be transposed views. It has no gradient in fp32 on CPUs."""
    if takes_onednn(a_MK, a_MK.numel() * b_KN.shape[1]):
        return by_onednn(a_MK, b_KN.t())
    return a_MK @ b_KN


def add_product(into_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Add A B to a matrix in place, and return it. It has no gradient."""
    if takes_onednn(a_MK, a_MK.numel() * b_KN.shape[1]):
        return into_MN.add_(by_onednn(a_MK, b_KN.t()))
    return into_MN.addmm_(a_MK, b_KN)


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return X Wᵀ + b [N, O], with its gradients."""
    if takes_onednn(x_NI, x_NI.numel() * weight_OI.shape[0]):
        return _Linear.apply(x_NI, weight_OI, bias_O)
    return functional.linear(x_NI, weight_OI, bias_O)


class _Linear(TensorFunction):
    """X [N, I], W [O, I], b [O] or None → Y = X Wᵀ + b; backward: dX = dY W, dW = dYᵀ X, db = Σ
    dY."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return by_onednn(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(dy_NO, weight_OI) if wants_x else None,
            product(dy_NO.t(), x_NI) if wants_weight else None,
            dy_NO.sum(0) if wants_bias else None,
        )
