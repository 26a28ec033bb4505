"""Combinations of ZeRO, offload and optimizer that cannot work, with the legal neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterator

from trainer.schema import Finding, Recipe

STATES = 4  # of Adam: the weights, two moments, the gradient


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
    if offload.device == "nvme" and (offload.pipeline_read or offload.pipeline_write) and offload.buffer_count < 2 * STATES:
        yield Finding(
            (
                "zero.offload_optimizer.buffer_count",
                "zero.offload_optimizer.pipeline_read",
                "zero.offload_optimizer.pipeline_write",
            ),
            f"zero.offload_optimizer.buffer_count = {offload.buffer_count}: with pipeline_read or pipeline_write two tiles of "
            f"{STATES} buffers each are in memory at once; legal: {2 * STATES} or more, or both false",
        )


def _optimizer_findings(recipe: Recipe) -> Iterator[Finding]:
    name, stage = recipe.optimizer.name, recipe.zero.stage
    if name == "adafactor" and stage:
        yield Finding(
            ("optimizer.name", "zero.stage"),
            f"optimizer.name = adafactor keeps second moments per row and column, which zero.stage {stage} flattens away; "
            "legal: zero.stage 0, or optimizer.name adamw, adam, sgd or lion",
        )
    if name == "adafactor" and recipe.parallel.tensor > 1:
        yield Finding(
            ("optimizer.name", "parallel.tensor"),
            "optimizer.name = adafactor averages second moments over whole rows and columns of a weight, of which "
            f"parallel.tensor {recipe.parallel.tensor} gives each rank a part: not the same training; legal: "
            "parallel.tensor 1, or optimizer.name adamw, adam, sgd or lion",
        )
    if name in ("lion", "sgd", "adafactor") and recipe.zero.offload_optimizer.device == "nvme":
        yield Finding(
            ("optimizer.name", "zero.offload_optimizer.device"),
            f'optimizer.name = {name} cannot be offloaded to "nvme": DeepSpeed swaps exactly the states of Adam; '
            'legal: adamw or adam, or zero.offload_optimizer.device "cpu" or "none"',
        )
