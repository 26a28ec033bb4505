"""JSON messages between ranks: what they tell each other besides tensors. Nothing is pickled, so
nothing received can run code."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Messages:
    """A channel among all ranks on a group of its own, so that a thread may talk while others
    compute. Messages stay in host memory.

    Every rank must make the same calls in the same order. With `group` None there is one rank.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def alone(cls) -> Messages:
        return cls(rank=0, size=1, group=None)

    @classmethod
    def among_all(cls, timeout: timedelta | None = None) -> Messages:
        """Open a channel among all ranks. Collective. `timeout`: how long a rank waits for the
        others."""
        size = dist.get_world_size()
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="messages") if size > 1 else None
        return cls(rank=dist.get_rank(), size=size, group=group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def combine(self, value: T, both: Callable[[T, T], T]) -> T | None:
        """Return all ranks' values as one, on the first rank; None on the others.

        `both` makes one JSON value of two, of which the second is of the ranks behind those of the
        first. The values go up a tree, so no rank receives more than log2 of the ranks' number, and
        what is made of many may be as short as what is made of two.
        """
        distance = 1
        while distance < self.size:
            if self.rank % (2 * distance):
                self._send(value, self.rank - distance)
                return None
            if self.rank + distance < self.size:
                value = both(value, self._receive(self.rank + distance))
            distance *= 2
        return value

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in the order of the ranks, on the first rank; None on the
        others."""
        return self.combine([value], operator.add)

    def first(self, text: str) -> str:
        """Return the text of the first rank that has one, on every rank; "" if none has."""
        found: str = self.broadcast(self.combine(text, lambda earlier, later: earlier or later))
        return found

    def _send(self, value: Any, rank: int) -> None:
        text = _encoded(value)
        dist.send(torch.tensor([text.numel()]), dst=rank, group=self.group)
        dist.send(text, dst=rank, group=self.group)

    def _receive(self, rank: int) -> Any:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, src=rank, group=self.group)
        text = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(text, src=rank, group=self.group)
        return _decoded(text)

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value, on every rank."""
        if self.group is None:
            return value
        text = _encoded(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([text.numel()])
        dist.broadcast(size, src=0, group=self.group)
        if not self.is_first:
            text = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, src=0, group=self.group)
        return _decoded(text)

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values, on every rank."""
        if self.group is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return int(number)

    def all(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks, on every rank."""
        values: list[Any] = self.broadcast(self.gather(value))
        return values


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
