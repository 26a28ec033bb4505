"""Collectives with gradients, over an explicit group.

The conjugate pairs of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, figure 3), out of place: autograd may still hold the
tensor that comes in.

| function | forward | backward | paper |
|---|---|---|---|
| `copy_to_group` | identity | all-reduce | f |
| `reduce_from_group` | all-reduce | identity | g |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor with the sum (or `op`) over the group; no gradient. The input itself when the group has one rank."""
    if group.size == 1:
        return tensor
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=op, group=group.handle)
    return result


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_group(tensor: Tensor, group: Group) -> Tensor:
    """Forward: the replicated tensor as it is. Backward: the sum of the group's gradients."""
    return tensor if group.size == 1 else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: Group) -> Tensor:
    """Forward: the sum of the group's partial tensors. Backward: the replicated gradient as it is."""
    return tensor if group.size == 1 else _ReduceFromGroup.apply(tensor, group)
