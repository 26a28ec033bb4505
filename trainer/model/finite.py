"""Values that are numbers, and stay numbers in another format."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import DataError, NotFinite, UserError

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDER = {"fp16": "bf16 or fp32", "bf16": "fp32", "fp32": "values that fp32 has"}


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; counters and codes never are."""
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def overflow(name: str, values: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with finite values that become infinite in `dtype`; None where they do not."""
    if not values.is_floating_point() or is_finite(values.to(dtype)):
        return None
    largest, form = float(values.abs().max()), NAMES[dtype]
    return f"tensor {name} has values up to {largest:.4g}, and {form} ends at {torch.finfo(dtype).max:.4g}"


class Rounding:
    """Rounds a model's tensors to `dtype`, and remembers the first that does not survive it.

    It does not raise on the way: the other ranks bring what is rounded, and would wait for the one that stopped taking it.
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
        """NotFinite or DataError for the first tensor that did not."""
        if self._wrong is not None:
            raise self._wrong
