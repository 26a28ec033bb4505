"""What torch's autograd lacks: types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class TensorFunction(torch.autograd.Function):
    """A differentiable function with a backward of its own that gives one tensor."""

    if TYPE_CHECKING:  # torch's own says nothing of what it takes and gives

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor: ...
