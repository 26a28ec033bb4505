"""The bytes of tensors that autograd keeps at the same time, counted while a real step runs.

A storage counts once, however many tensors lie in it, and weights and tokens not at all. What a recomputed part keeps as its
inputs, and what waits for the gradients of weights that are computed later, is not seen by autograd's hooks: these tensors
are taken where the part is called, and where the products are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import parallel.attention
import parallel.cross_attention
import trainer.model.transformer
from parallel.deferred import WeightGradients

RECOMPUTING = (parallel.attention, parallel.cross_attention, trainer.model.transformer)


class Kept:
    """Storages that are kept, each with the number of its holders; `peak`: the most bytes so far."""

    def __init__(self, ignored: set[int]) -> None:
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._ignored = ignored
        self.peak = 0

    def hold(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        if at in self._ignored or not at:
            return tensor.detach() if not isinstance(tensor, torch.nn.Parameter) else _Holder(self, None, tensor)
        self._holders[at] = self._holders.get(at, 0) + 1
        self._sizes[at] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))
        return _Holder(self, at, tensor.detach())

    def release(self, at: int) -> None:
        self._holders[at] -= 1
        if not self._holders[at]:
            del self._holders[at], self._sizes[at]


class _Holder:
    def __init__(self, kept: Kept, at: int | None, tensor: Tensor) -> None:
        self.kept, self.at, self.tensor = kept, at, tensor

    def __del__(self) -> None:
        if self.at is not None:
            self.kept.release(self.at)


@contextmanager
def kept_tensors(ignored: set[int]) -> Iterator[Kept]:
    """Count what is kept inside the block. `ignored`: storages that do not count."""
    kept = Kept(ignored)
    real = {module: module.checkpoint for module in RECOMPUTING}
    put = WeightGradients.put

    def put_and_hold(queue: WeightGradients, weight: torch.nn.Parameter, product: Callable[[], Tensor]) -> None:
        cells = [cell.cell_contents for cell in product.__closure__ or ()]
        holders = [kept.hold(tensor) for tensor in tensors_of(cells)]

        def holding() -> Tensor:
            assert holders is not None
            return product()

        put(queue, weight, holding)

    def checkpoint_of(module: Any) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled() or in_backward():
                return real[module](function, *inputs, **options)
            holders = [kept.hold(tensor) for tensor in tensors_of(inputs)]

            def holding(*again: Any) -> Any:
                assert holders is not None
                return function(*again)

            return real[module](holding, *inputs, **options)

        return checkpoint

    for module in RECOMPUTING:
        module.checkpoint = checkpoint_of(module)  # type: ignore[attr-defined]
    WeightGradients.put = put_and_hold  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.hold, lambda held: getattr(held, "tensor", held)):
            yield kept
    finally:
        WeightGradients.put = put  # type: ignore[method-assign]
        for module in RECOMPUTING:
            module.checkpoint = real[module]  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Return whether the code runs in a backward, where a part is computed again."""
    return torch._C._current_graph_task_id() != -1


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)
