"""Collectives over an explicit group, and pairs of them that are each other's backward.

All work out of place, because autograd may still hold the input. The pairs are Megatron-LM's: f, g
and ḡ are the names in Shoeybi et al. 2019 (arXiv:1909.08053, figure 3) and Korthikanti et al. 2022
(arXiv:2205.05198, figure 5).

| function | forward | backward | paper |
|---|---|---|---|
| `copy_to_group` | identity | all-reduce | f of Shoeybi |
| `reduce_from_group` | all-reduce | identity | g of Shoeybi, the conjugate of f |
| `gather_tokens` | all-gather along dim 0 | reduce-scatter | g of Korthikanti |
| `scatter_tokens` | reduce-scatter along dim 0 | all-gather | ḡ, its conjugate |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import direct
from parallel.autograd import TensorFunction
from parallel.mesh import Group


@dataclass
class Pending:
    """A collective under way; `wait` returns its result, as often as it is asked: messages must be
    waited for only once."""

    result: Tensor
    work: direct.Work | None

    def wait(self) -> Tensor:
        work, self.work = self.work, None
        if work is not None:
            work.wait()
        return self.result


def start_all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Start the sum (or `op`) over the group, into a new tensor. With one rank the result is the
    input itself."""
    if group.size == 1:
        return Pending(tensor, None)
    result = tensor.clone(memory_format=torch.contiguous_format)
    return Pending(result, dist.all_reduce(result, op=op, group=group.handle, async_op=True))


def start_all_gather(tensor: Tensor, group: Group) -> Pending:
    """Start to concatenate the group's tensors along dim 0, in the order of the ranks."""
    if group.size == 1:
        return Pending(tensor, None)
    result = tensor.new_empty((tensor.shape[0] * group.size, *tensor.shape[1:]))
    if tensor.is_cpu:
        return Pending(result, direct.start_gather(result, tensor, _handle(group)))
    return Pending(result, dist.all_gather_single(result, tensor.contiguous(), group=group.handle, async_op=True))


def start_reduce_scatter(tensor: Tensor, group: Group) -> Pending:
    """Start the sum over the group, of which this rank gets its share along dim 0."""
    if group.size == 1:
        return Pending(tensor, None)
    result = tensor.new_empty((group.part(tensor.shape[0], "tokens"), *tensor.shape[1:]))
    if tensor.is_cpu:
        return Pending(result, direct.start_reduce_scatter(result, tensor.contiguous(), _handle(group)))
    return Pending(result, dist.reduce_scatter_single(result, tensor.contiguous(), group=group.handle, async_op=True))


def _handle(group: Group) -> dist.ProcessGroup:
    assert group.handle is not None, "these ranks are not running"
    return group.handle


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum (or `op`) over the group in a new tensor, without gradient. With one rank it
    is the input itself."""
    return start_all_reduce(tensor, group, op).wait()


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Return the group's tensors concatenated along dim 0, without gradient."""
    return start_all_gather(tensor, group).wait()


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """Return this rank's share, along dim 0, of the sum over the group, without gradient.

    ValueError if dim 0 does not divide over the ranks.
    """
    return start_reduce_scatter(tensor, group).wait()


Collective = Callable[[Tensor, Group], Tensor]


class _Pair(TensorFunction):
    """A collective forward, and another one on the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, forward: Collective, backward: Collective) -> Tensor:
        ctx.group, ctx.collective = group, backward
        return forward(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.collective(grad, ctx.group), None, None, None


def _as_it_is(tensor: Tensor, group: Group) -> Tensor:
    return tensor.view_as(tensor)


def copy_to_group(tensor: Tensor, group: Group) -> Tensor:
    """Return the replicated tensor as it is. Backward: the sum of the group's gradients."""
    return tensor if group.size == 1 else _Pair.apply(tensor, group, _as_it_is, all_reduce)


def reduce_from_group(tensor: Tensor, group: Group) -> Tensor:
    """Return the sum of the group's partial tensors. Backward: the replicated gradient as it is."""
    return tensor if group.size == 1 else _Pair.apply(tensor, group, all_reduce, _as_it_is)


def gather_tokens(tensor: Tensor, group: Group) -> Tensor:
    """Return all ranks' tokens, concatenated. Backward: this rank's tokens of the sum of the
    group's gradients."""
    return tensor if group.size == 1 else _Pair.apply(tensor, group, all_gather, reduce_scatter)


def scatter_tokens(tensor: Tensor, group: Group) -> Tensor:
    """Return this rank's tokens of the sum of the group's partial tensors. Backward: all ranks'
    gradients, concatenated."""
    return tensor if group.size == 1 else _Pair.apply(tensor, group, reduce_scatter, all_gather)
