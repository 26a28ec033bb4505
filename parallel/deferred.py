"""Deferred weight gradients, for schedules that split the backward (Qi et al. 2023,
arXiv:2401.10241)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightGradients:
    """A queue in which the linear layers of a pipeline stage leave the matrix products of their
    weight gradients.

    The backward of a micro-batch then computes only the gradients of inputs, and those of norms and
    biases, which cost next to nothing. `take` hands over the products left behind, to be computed
    when the schedule says so.
    """

    def __init__(self) -> None:
        self._products: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def put(self, weight: nn.Parameter, product: Callable[[], Tensor]) -> None:
        self._products.append((weight, product))

    def take(self) -> Callable[[], None]:
        """Return a function that computes the products left since the last call, and empty the
        queue.

        The function accumulates each gradient as autograd would, so hooks on the weight run.
        """
        products, self._products = self._products, []

        def compute() -> None:
            while products:
                weight, product = products.pop(0)
                torch.autograd.backward([weight], [product()])

        return compute
