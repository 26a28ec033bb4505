"""Weight gradients put off, for schedules that split the backward (Qi et al. 2023, arXiv:2401.10241)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightGradients:
    """Where the linear layers of a pipeline stage leave the matrix products of their weight gradients.

    The backward of a micro-batch then computes input gradients only (and the gradients of norms and biases, which cost next
    to nothing); `take` hands over what it left, to be computed when the schedule says so.
    """

    def __init__(self) -> None:
        self._products: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def put(self, weight: nn.Parameter, product: Callable[[], Tensor]) -> None:
        self._products.append((weight, product))

    def take(self) -> Callable[[], None]:
        """What was left since the last time. Calling it computes each gradient and accumulates it as autograd would: hooks on
        the weight run."""
        products, self._products = self._products, []

        def compute() -> None:
            while products:
                weight, product = products.pop(0)
                torch.autograd.backward([weight], [product()])

        return compute
