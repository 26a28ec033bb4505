"""The checks that values are finite, and stay finite in another format."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import DataError, NotFinite, UserError

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDER = {"fp16": "bf16 or fp32", "bf16": "fp32", "fp32": "values that fp32 has"}


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite; counters and codes never are."""
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def overflow(name: str, values: Tensor, dtype: torch.dtype) -> str | None:
    """Return what is wrong with finite values that become infinite in `dtype`; None where they do
    not."""
    if not values.is_floating_point() or is_finite(values.to(dtype)):
        return None
    largest, form = float(values.abs().max()), NAMES[dtype]
    return f"tensor {name} has values up to {largest:.4g}, and {form} ends at {torch.finfo(dtype).max:.4g}"


class Rounding:
    """A function that rounds a model's tensors to `dtype`, and remembers the first that is not
    finite then.

    It raises no error between tensors: the other ranks take part in the gathering, and would wait
    for a rank that stopped.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._wrong: UserError | None = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self._wrong is None:
            if not is_finite(tensor):
                self._wrong = NotFinite(f"tensor {name}")
            elif told := overflow(name, tensor, self._dtype):
                self._wrong = DataError(f"{told}: export in {WIDER[NAMES[self._dtype]]}")
        return tensor.to(self._dtype)

    def require_survivors(self) -> None:
        """Raise NotFinite or DataError for the first tensor that was not finite."""
        if self._wrong is not None:
            raise self._wrong
