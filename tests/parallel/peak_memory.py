"""The most bytes that all tensors of a process take at the same time while a block runs.

Counted are the storages of tensors that exist when the block begins, and of all that an operation returns after that; not what
an operation takes inside.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """`peak`: the most bytes so far; `during`: the operation after which they were there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.during = 0, ""
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._seen(tensor for tensor in gc.get_objects() if issubclass(type(tensor), Tensor))

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._seen(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        for at in [at for at, (storage, _) in self._live.items() if storage.expired()]:
            del self._live[at]
        held = sum(size for _, size in self._live.values())
        if held > self.peak:
            self.peak, self.during = held, str(function)
        return result

    def _seen(self, tensors: Iterator[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.is_sparse:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the block."""
    gc.collect()
    with PeakMemory() as measured:
        yield measured
