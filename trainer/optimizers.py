"""The update rules, from torch or DeepSpeed.

torch's fused Adam and SGD serve GPU state and offloaded (CPU) state alike and need no compiler; DeepSpeed's CPU Adam, which
does, was measured no faster (see `tools/bench_optimizers.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from parallel.params import Role, ShardSpec
from trainer.errors import RecipeError
from trainer.sections import Recipe

Specified = Sequence[tuple[nn.Parameter, ShardSpec]]


def num_groups(parameters: Specified) -> int:
    """How many kinds of parameters are trained: those that decay, and those that do not."""
    return len({spec.role is Role.MATRIX for p, spec in parameters if p.requires_grad})


def make_optimizer(recipe: Recipe, parameters: Specified, device: torch.device, *, least_groups: int = 1) -> Optimizer:
    """The recipe's update rule. Weight decay goes by the parameter's role: matrices only. `least_groups`: as many as any rank
    of the replica has. ZeRO reduces one norm after another, for each group, so ranks with fewer would be waited for: a stage of
    a pipeline in which only matrices are trained, between the ends with rows of new tokens."""
    keys = recipe.optimizer
    parameters = [(p, spec) for p, spec in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, spec in parameters if spec.role is Role.MATRIX], "weight_decay": keys.weight_decay},
        {"params": [p for p, spec in parameters if spec.role is not Role.MATRIX], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    while len(groups) < least_groups:
        groups.append({**groups[0], "params": [groups[0]["params"].pop()]})
    betas = (keys.betas[0], keys.betas[1])
    match keys.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=keys.lr, betas=betas, eps=keys.eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=keys.lr, betas=betas, eps=keys.eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=keys.lr, momentum=keys.momentum, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=keys.lr)
        case "lion":
            on_host = device.type == "cpu" or recipe.zero.offload_optimizer.device != "none"
            return _lion("DeepSpeedCPULion" if on_host else "FusedLion")(groups, lr=keys.lr, betas=betas)


def _lion(name: str) -> Callable[..., Optimizer]:
    """DeepSpeed's class, after a try whether its extension is or can be compiled here."""
    rule: Callable[..., Optimizer] = getattr(importlib.import_module("deepspeed.ops.lion"), name)
    try:
        rule([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # compilers fail in too many ways to name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"optimizer.name = lion needs DeepSpeed's {name}, which could not be compiled here ({reason}): install a C++ "
            "compiler (and nvcc for GPUs), or use adamw"
        ) from error
    return rule
