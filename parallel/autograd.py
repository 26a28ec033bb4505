"""A typed base class for our autograd functions, which torch leaves untyped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class TensorFunction(torch.autograd.Function):
    """A differentiable function that has its own backward and returns one tensor."""

    if TYPE_CHECKING:  # torch's own `apply` has no annotations

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor: ...


class TensorsFunction(torch.autograd.Function):
    """A differentiable function that has its own backward and returns several tensors."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]: ...
