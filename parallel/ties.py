"""Weights that pipeline stages share: their gradients, summed once per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.mesh import Group, Mesh
from parallel.params import owned_specs


def part_of_pipeline(mesh: Mesh, places: Sequence[int]) -> Group | None:
    """The ranks at these places of this rank's pipeline, None where it is not at one. Collective over all ranks: torch knows a
    group by how many a rank is in, which differs along a pipeline."""
    if len(places) == mesh.pp.size:
        return mesh.pp
    if len(places) == 1:
        return Group.alone() if mesh.pp.rank == places[0] else None
    mine = None
    for pipeline in mesh.layout.groups("pp"):
        ranks = tuple(pipeline[place] for place in places)
        handle = dist.new_group(list(ranks), group_desc="part of pp")
        if mesh.rank in ranks:
            mine = Group(rank=ranks.index(mesh.rank), ranks=ranks, handle=handle)
    return mine


class TiedGradients:
    """Keeps the gradients of a stage's tied weights out of its backwards until `totals` sums them over the copies.

    The stages' backwards of one micro-batch do not meet: a collective inside them would wait for a stage that waits for this
    one. So each backward's gradient is added up here in fp32 and passed on as zeros, and when the schedule is done the total
    is given to the weight once, as if by one more backward. It then takes the way of every gradient, at any ZeRO stage.
    """

    def __init__(self, module: nn.Module) -> None:
        """Collects from now on; every owner of a tied weight must do so."""
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._copies: dict[nn.Parameter, Group] = {}
        self._collecting = True
        tied = ((spec, parameter) for _, parameter, spec in owned_specs(module) if spec.tied)
        # By their names, an order that all ranks share: stages have them in their own.
        for spec, parameter in sorted(tied, key=lambda pair: pair[0].pieces[0].name):
            if parameter.requires_grad:
                self._copies[parameter] = spec.copies
                parameter.register_hook(self._collector(parameter))

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self._copies)

    def _collector(self, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def collect(grad: Tensor) -> Tensor:
            if not self._collecting:
                return grad
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            self._sums[parameter] = self._sums[parameter] + wide if parameter in self._sums else wide
            return torch.zeros_like(grad)

        return collect

    def totals(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each tied weight with the sum of its gradients over all copies and backwards since the last time, in its format.

        Collective over the copies. What is accumulated while this is iterated is passed on.
        """
        self._collecting = False
        try:
            for parameter, copies in self._copies.items():
                yield parameter, all_reduce(self._sums.pop(parameter), copies).to(parameter.dtype)
        finally:
            self._collecting = True
