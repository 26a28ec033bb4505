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
    """Return the group of the ranks at these places of this rank's pipeline, or None if it is at
    none of them.

    Collective over all ranks: torch numbers a group by how many groups a rank is in, and that
    differs along a pipeline.
    """
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
    """A collector that keeps the gradients of a stage's tied weights out of its backwards, until
    `totals` sums them over the copies.

    The stages do not run their backwards of one micro-batch at the same time, so a collective
    inside a backward would wait for a stage that waits for this one. Each backward's gradient is
    instead added up here in fp32 and passed on as zeros. When the schedule is done, the total is
    given to the weight once, as if by one more backward, and takes the way of every gradient at any
    ZeRO stage.
    """

    def __init__(self, module: nn.Module) -> None:
        """Start collecting. Every owner of a tied weight must do so."""
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._copies: dict[nn.Parameter, Group] = {}
        self._collecting = True
        tied = ((spec, parameter) for _, parameter, spec in owned_specs(module) if spec.tied)
        # Sorted by name, an order that all ranks share; the order in the modules differs by stage.
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
        """Yield each tied weight with the sum of its gradients over all copies and backwards since
        the last call, in its dtype.

        Collective over the copies. Gradients that are accumulated during the iteration are passed
        on.
        """
        self._collecting = False
        try:
            for parameter, copies in self._copies.items():
                yield parameter, all_reduce(self._sums.pop(parameter), copies).to(parameter.dtype)
        finally:
            self._collecting = True
