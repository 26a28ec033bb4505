"""What a recipe may ask of parameter-efficient tuning."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.model.auto_rules import AUTO
from trainer.schema import Finding, Recipe

METHOD = "tuning.method"


def tuning_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield what tuning does not go with."""
    if recipe.tuning.method is None:
        return
    if recipe.tuning.method == "adalora":
        yield from _budget_findings(recipe)
    if recipe.model.family == AUTO:
        yield Finding(
            (METHOD, "model.family"),
            f'{METHOD} = "{recipe.tuning.method}" adapts our own layers, which family "auto" does not have: remove '
            "it, or take one of the families that are built here",
        )
    if recipe.zero.offload_param.device == "nvme":
        yield Finding(
            ("zero.offload_param.device", METHOD),
            f'zero.offload_param.device = "nvme": DeepSpeed 0.19 runs out of swap buffers where weights are frozen ({METHOD}); '
            'legal: "cpu" or "none"',
        )


def _budget_findings(recipe: Recipe) -> Iterator[Finding]:
    rank, budget, steps = recipe.tuning.rank, recipe.tuning.budget, recipe.train.steps
    if budget.target_rank >= rank:
        yield Finding(
            ("tuning.budget.target_rank", "tuning.rank"),
            f"tuning.budget.target_rank = {budget.target_rank} leaves nothing to share out of tuning.rank = {rank}: legal: "
            f"below {rank}, or tuning.rank above {budget.target_rank}",
        )
    if (fixed := budget.warmup_steps + budget.final_steps) >= steps:
        yield Finding(
            ("tuning.budget.warmup_steps", "tuning.budget.final_steps", "train.steps"),
            f"tuning.budget: warmup_steps {budget.warmup_steps} + final_steps {budget.final_steps} = {fixed} of train.steps = "
            f"{steps} leave no step in which ranks are shared out: legal: fewer than {steps} together",
        )
