"""How many parameters a run trains, and how many it only holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from parallel.collectives import all_reduce
from parallel.mesh import Group
from parallel.params import ShardSpec
from parallel.quantized import QuantizedWeight


class ParameterCounts(NamedTuple):
    """Elements of the whole logical model, tied ones once. `frozen_bytes`: in the format in which they are held."""

    trained: int
    frozen: int
    frozen_bytes: int

    @classmethod
    def of(
        cls,
        specs: Iterable[tuple[nn.Parameter, ShardSpec]],
        replica: Group,
        device: torch.device,
        quantized: Iterable[QuantizedWeight] = (),
    ) -> ParameterCounts:
        """`replica`: the ranks that hold one copy of the model together; each must ask."""
        numbers = torch.zeros(3, dtype=torch.int64, device=device)
        for parameter, spec in specs:
            if not spec.owned:
                continue
            elements = sum(torch.Size(piece.size).numel() for piece in spec.pieces)
            held = [elements, 0, 0] if parameter.requires_grad else [0, elements, elements * parameter.element_size()]
            numbers += torch.tensor(held, device=device)
        for weight in quantized:
            if weight.spec.owned:
                numbers += torch.tensor([0, weight.numel, weight.num_bytes], device=device)
        return cls(*all_reduce(numbers, replica).tolist())

    @property
    def trained_beside(self) -> int | None:
        """Elements trained beside a frozen network; None where the network itself is trained."""
        return self.trained if self.frozen else None
