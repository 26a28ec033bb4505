"""The result of an optimizer step, whose numbers stay on the device until one is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

MOST_UNREAD = 100  # results; then they are read, asked for or not

Record = Callable[[Sequence[float]], Mapping[str, float]]


class StepResult:
    """The result of one optimizer step, the same on every rank.

    `skipped`: the gradient was not applied, because its norm was not finite or above the caller's
    limit. `loss_scale`: that of the step. The others are read from the device when one of them is
    asked for, together with those of all earlier steps that are not read yet: one transfer.
    """

    def __init__(
        self,
        means: Tensor,
        num_targets: Tensor | float,
        grad_norm: Tensor | float,
        loss_scale: float,
        skipped: bool = False,
        *,
        record: Record = lambda means: {},
        unread: list[StepResult] | None = None,
    ) -> None:
        """Take the numbers. `means`: the loss, then the task's statistics, float64. `record` names
        the statistics. `unread`: the results of earlier steps, to which this one is added."""
        self.loss_scale, self.skipped, self._record = loss_scale, skipped, record
        last = [torch.as_tensor(number, dtype=means.dtype, device=means.device) for number in (num_targets, grad_norm)]
        self._numbers = torch.cat([means, torch.stack(last)])
        self._values: list[float] | None = None
        self._unread = [] if unread is None else unread
        self._unread.append(self)
        if len(self._unread) >= MOST_UNREAD:
            self._read()

    @property
    def loss(self) -> float:
        return self._read()[0]

    @property
    def statistics(self) -> Mapping[str, float]:
        """The task's, beside its loss."""
        return self._record(self._read()[1:-2])

    @property
    def num_targets(self) -> int:
        return int(self._read()[-2])

    @property
    def grad_norm(self) -> float:
        """The gradient's norm before clipping; inf when it was not finite."""
        norm = self._read()[-1]
        return norm if math.isfinite(norm) else math.inf

    @property
    def is_read(self) -> bool:
        """Return whether the numbers are on the host, so that asking for one costs nothing."""
        return self._values is not None or self._numbers.is_cpu

    def _read(self) -> list[float]:
        if self._values is None:
            for result, values in zip(self._unread, torch.stack([one._numbers for one in self._unread]).tolist(), strict=True):
                result._values = values
            self._unread.clear()
        assert self._values is not None
        return self._values
