"""The attributes that DeepSpeed's ZeRO-3 adds to the parameters it divides, which torch's types do
not declare."""

from __future__ import annotations

from enum import Enum
from typing import Protocol, cast

from torch import Tensor, nn


class Share(Tensor):
    """A rank's part of a parameter, flat and padded; on NVMe while it is not "AVAILABLE"."""

    status: Enum


class Divided(Protocol):
    """A parameter of `ds_numel` elements, cut into equal shares of `partition_numel`."""

    ds_tensor: Share
    ds_numel: int

    def partition_numel(self) -> int: ...


def divided(parameter: nn.Parameter) -> Divided:
    return cast(Divided, parameter)
