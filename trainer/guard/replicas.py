"""The comparison, to the bit, of weights that several ranks hold: data-parallel replicas, copies
over tensor ranks, tied ends.

Faulty memory or a faulty device changes one of them silently, and training goes on with two models
in one (Dixit et al. 2021, arXiv:2102.11245). The checksum of a tensor is the sum of its raw bits as
integers, each times an odd number that depends on its place, modulo 2⁶⁴. It changes whenever a
single element does: an odd factor can be divided out again, so no change of one element is lost.

What has no second holder cannot be compared: ZeRO-3's shares, and the fp32 master weights of ZeRO-1
and 2, from which DeepSpeed makes the held weights anew at every step. A wrong bit there is seen in
the step in which it is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.mesh import Group, Mesh
from parallel.messages import Messages
from parallel.params import ShardSpec
from trainer.engine.zero_parameter import Share, divided

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # elements widened to int64 at a time: 24 MiB with their factors


@dataclass(frozen=True)
class Held:
    """A parameter as far as a rank holds it, and the ranks that must hold the same."""

    name: str
    values: Tensor
    group: Group


def disagreements(held: Sequence[Held], ranks: Messages, device: torch.device, *, step: int, lr: float) -> list[str]:
    """Return what differs between ranks, a phrase each, the same on every rank; [] if all agree.
    Collective over all ranks."""
    mine = {f"{item.name} {list(item.group.ranks)}": sum_ for item, sum_ in _differing(held, device)}
    told = ranks.all({"step": step, "lr": lr.hex(), "sums": mine})
    phrases = [
        f"{word} {odd_ones_out([str(of_rank[key]) for of_rank in told], range(ranks.size))}"
        for key, word in (("step", "the step number is not the same:"), ("lr", "the learning rate is not the same:"))
        if len({of_rank[key] for of_rank in told}) > 1
    ]
    for what in dict.fromkeys(what for of_rank in told for what in of_rank["sums"]):
        holders = [rank for rank, of_rank in enumerate(told) if what in of_rank["sums"]]
        sums = [told[rank]["sums"][what] for rank in holders]
        phrases.append(f"weight {what.split(' ')[0]} is not the same: {odd_ones_out(sums, holders)}")
    return phrases


def replicas(specs: Sequence[tuple[nn.Parameter, ShardSpec]], mesh: Mesh, zero_stage: int) -> Iterator[Held]:
    """Yield everything of this rank that other ranks hold too."""
    for parameter, spec in specs:
        name = spec.pieces[0].name if spec.pieces else "padding"
        values = _without_padding(parameter, mesh.reduction) if zero_stage == 3 else held_values(parameter)
        if mesh.reduction.size > 1 and zero_stage < 3:
            yield Held(name, values, mesh.reduction)
        if spec.copies.size > 1:
            yield Held(name, values, spec.copies)


def held_values(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter between steps: all of it, or under ZeRO-3 its
    share, flat.

    Of a share that is on NVMe it returns nothing.
    """
    share: Share | None = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter.detach()
    return share.detach().reshape(-1)[: share.numel() if share.status.name == "AVAILABLE" else 0]


def checksum(values: Tensor) -> Tensor:
    """Return an int64 that changes with any change of one element."""
    bits = values.contiguous().view(BITS[values.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    factors = 2 * torch.arange(min(CHUNK, bits.numel()), dtype=torch.int64, device=values.device) + 1
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        total += (chunk * factors[: chunk.numel()]).sum() + 2 * start * chunk.sum()
    return total


def odd_ones_out(values: Sequence[str], ranks: Sequence[int]) -> str:
    """Return which ranks' value is not that of most ranks, in words."""
    (common, votes), *others = Counter(values).most_common()
    if others and others[0][1] == votes:
        return f"ranks {_listed(ranks)} differ"
    odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
    rest = [rank for rank, value in zip(ranks, values, strict=True) if value == common]
    return f"rank{'s' if len(odd) > 1 else ''} {_listed(odd)} differ{'' if len(odd) > 1 else 's'} from {_listed(rest)}"


def _differing(held: Sequence[Held], device: torch.device) -> Iterator[tuple[Held, str]]:
    """Yield what is not the same in its group, with this rank's checksum of it.

    There is one pair of reductions for each group, in an order that all ranks share, so that no two
    ranks wait for each other.
    """
    by_name = sorted(held, key=lambda item: item.name)
    for group in sorted({item.group.ranks: item.group for item in by_name}.values(), key=lambda group: group.ranks):
        items = [item for item in by_name if item.group.ranks == group.ranks]
        sums = torch.stack([checksum(item.values).to(device) for item in items])
        least, most = (all_reduce(sums, group, op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
        for place in (least != most).nonzero().flatten().tolist():
            yield items[place], str(int(sums[place]))


def _without_padding(parameter: nn.Parameter, dp: Group) -> Tensor:
    """Return a share of ZeRO-3 without the padding at its end, which nobody sets."""
    start = dp.rank * divided(parameter).partition_numel()
    return held_values(parameter)[: max(0, divided(parameter).ds_numel - start)]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
