"""Rules of ZeRO, offload and optimizer: combinations that cannot work, with legal neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from trainer.schema import Finding, Recipe
from trainer.update_rules import RULES, RuleName, UpdateRule, rule_of

# tensors of a weight that DeepSpeed swaps together: itself, its gradient, Adam's two states
SWAPPED = 4


def zero_findings(recipe: Recipe) -> Iterator[Finding]:
    yield from _stage_findings(recipe)
    yield from _offload_findings(recipe)
    yield from _optimizer_findings(recipe)


def _stage_findings(recipe: Recipe) -> Iterator[Finding]:
    zero = recipe.zero
    weights, states = zero.offload_param.device, zero.offload_optimizer.device
    if weights != "none" and zero.stage != 3:
        yield Finding(
            ("zero.offload_param.device", "zero.stage"),
            f"zero.offload_param.device = {json.dumps(weights)} needs zero.stage 3, which divides the weights, not "
            f'{zero.stage}; legal: zero.stage 3, or zero.offload_param.device "none"',
        )
    if states == "nvme" and zero.stage != 3:
        legal = '"cpu" or "none"' if zero.stage else '"none"'
        yield Finding(
            ("zero.offload_optimizer.device", "zero.stage"),
            f'zero.offload_optimizer.device = "nvme" needs zero.stage 3, not {zero.stage}; legal: zero.stage 3, or '
            f"zero.offload_optimizer.device {legal}",
        )
    if states == "cpu" and zero.stage == 0:
        yield Finding(
            ("zero.offload_optimizer.device", "zero.stage"),
            'zero.offload_optimizer.device = "cpu" needs a zero.stage that divides the optimizer state, not 0; '
            'legal: zero.stage 1, 2 or 3, or zero.offload_optimizer.device "none"',
        )


def _offload_findings(recipe: Recipe) -> Iterator[Finding]:
    for name in ("offload_optimizer", "offload_param"):
        block, path = getattr(recipe.zero, name), f"zero.{name}"
        keys = (f"{path}.nvme_path", f"{path}.device")
        if block.device == "nvme" and block.nvme_path is None:
            yield Finding(keys[::-1], f'{path}.device = "nvme" needs {path}.nvme_path, a folder on a local NVMe drive')
    offload = recipe.zero.offload_optimizer
    if offload.device == "nvme" and (offload.pipeline_read or offload.pipeline_write) and offload.buffer_count < 2 * SWAPPED:
        yield Finding(
            (
                "zero.offload_optimizer.buffer_count",
                "zero.offload_optimizer.pipeline_read",
                "zero.offload_optimizer.pipeline_write",
            ),
            f"zero.offload_optimizer.buffer_count = {offload.buffer_count}: with pipeline_read or pipeline_write two tiles of "
            f"{SWAPPED} buffers each are in memory at once; legal: {2 * SWAPPED} or more, or both false",
        )


def _optimizer_findings(recipe: Recipe) -> Iterator[Finding]:
    name, stage, degree = recipe.optimizer.name, recipe.zero.stage, recipe.parallel.tensor
    rule = rule_of(recipe.optimizer)
    if rule.not_divided and stage:
        others = _names(lambda other: not other.not_divided)
        yield Finding(
            ("optimizer.name", "zero.stage"),
            f"optimizer.name = {name} {rule.not_divided.format(stage)}; legal: zero.stage 0, or optimizer.name {others}",
        )
    if rule.not_sharded and degree > 1:
        others = _names(lambda other: not other.not_sharded)
        yield Finding(
            ("optimizer.name", "parallel.tensor"),
            f"optimizer.name = {name} {rule.not_sharded.format(degree)}; legal: parallel.tensor 1, or optimizer.name {others}",
        )
    if not rule.on_nvme and recipe.zero.offload_optimizer.device == "nvme":
        others = _names(lambda other: other.on_nvme)
        yield Finding(
            ("optimizer.name", "zero.offload_optimizer.device"),
            f'optimizer.name = {name} cannot be offloaded to "nvme": DeepSpeed swaps exactly the states of Adam; '
            f'legal: {others}, or zero.offload_optimizer.device "cpu" or "none"',
        )


def _names(wanted: Callable[[UpdateRule], bool]) -> str:
    """Return the rules that are `wanted`, as a message lists them: "adamw, adam or sgd"."""
    names: list[RuleName] = [name for name, rule in RULES.items() if wanted(rule)]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
