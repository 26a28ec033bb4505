"""The update rules, from torch or DeepSpeed.

torch's fused Adam and SGD serve state on the GPU and offloaded state on the CPU, and need no
compiler. DeepSpeed's CPU Adam needs one, and was measured no faster (see
`tools/bench_optimizers.py`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from parallel.params import Role, ShardSpec
from trainer.engine.built_ops import use_built
from trainer.engine.extension_folder import break_stale_locks, extensions_folder
from trainer.engine.tiling import ALONE, Tiling
from trainer.errors import RecipeError
from trainer.schema import Recipe
from trainer.update_rules import RULES, RuleName, rule_of

Specified = Sequence[tuple[nn.Parameter, ShardSpec]]
Groups = list[dict[str, Any]]
Maker = Callable[..., Optimizer]


def groups_of(parameters: Specified, tiling: Tiling) -> list[list[nn.Parameter]]:
    """Return the trained parameters in groups. Matrices, which alone decay, and others are never in
    one group."""
    trained = [(p, spec.role is Role.MATRIX) for p, spec in parameters if p.requires_grad]
    kinds = [[p for p, is_matrix in trained if is_matrix], [p for p, is_matrix in trained if not is_matrix]]
    return tiling.groups(kinds, _elements_here)


def _elements_here(parameter: nn.Parameter) -> int:
    """Return the number of elements on this rank, which at ZeRO-3 has a part of the parameter."""
    return int(parameter.partition_numel()) if hasattr(parameter, "partition_numel") else parameter.numel()


def make_optimizer(recipe: Recipe, parameters: Specified, device: torch.device, *, tiling: Tiling = ALONE) -> Optimizer:
    """Make the recipe's update rule. Weight decay goes by the parameter's role: matrices only."""
    keys = recipe.optimizer
    decays = {id(p) for p, spec in parameters if spec.role is Role.MATRIX}
    groups: Groups = [
        {"params": group, "weight_decay": keys.weight_decay if id(group[0]) in decays else 0.0}
        for group in groups_of(parameters, tiling)
    ]
    read = {key: getattr(keys, key) for key in rule_of(keys).reads}
    read = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
    on_host = device.type == "cpu" or recipe.zero.offload_optimizer.device != "none"
    return MAKERS[keys.name](groups, on_host=on_host, lr=keys.lr, **read)


def _torch(rule: Callable[..., Optimizer], **always: Any) -> Maker:
    """Return a function that makes an optimizer of one of torch's classes."""

    def make(groups: Groups, *, on_host: bool, **keys: Any) -> Optimizer:
        return rule(groups, **keys, **always)

    return make


def _lion(groups: Groups, *, on_host: bool, **keys: Any) -> Optimizer:
    """Make DeepSpeed's Lion, whose extension is compiled now unless it is built. RecipeError if
    that fails."""
    name = "DeepSpeedCPULion" if on_host else "FusedLion"
    rule: Callable[..., Optimizer] = getattr(importlib.import_module("deepspeed.ops.lion"), name)
    try:
        _prepare_extension("lion", on_host=on_host)
        rule([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # a compiler fails in too many ways to name them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"optimizer.name = lion needs DeepSpeed's {name}, which could not be compiled here ({reason}): install a C++ "
            "compiler (and nvcc for GPUs), or use adamw"
        ) from error
    return rule(groups, **keys)


def _prepare_extension(rule: RuleName, *, on_host: bool) -> None:
    """Load what `triaxis doctor --build` compiled. Where there is nothing, DeepSpeed compiles, and
    must not wait for a build that was killed."""
    extensions = RULES[rule].extensions
    if extensions is not None:
        extension = extensions.on_host if on_host else extensions.on_gpu
        if not use_built(extension):
            break_stale_locks(extensions_folder(os.environ), extension)


# The class of each rule is called with groups of parameters and the keys that its row in
# `update_rules.py` reads. `on_host`: whether its states are in the memory of the host.
MAKERS: dict[RuleName, Maker] = {
    "adamw": _torch(torch.optim.AdamW, fused=True),
    "adam": _torch(torch.optim.Adam, fused=True),
    "sgd": _torch(torch.optim.SGD, fused=True),
    "lion": _lion,
    "adafactor": _torch(torch.optim.Adafactor),
}
