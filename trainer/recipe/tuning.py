"""What a recipe may ask of parameter-efficient tuning."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.model.auto_rules import AUTO
from trainer.schema import Finding, RankBudget, Recipe

METHOD = "tuning.method"
# Which methods read which key.
READERS = {
    "targets": ("lora", "dora", "adalora", "ia3", "adapter"),
    "rank": ("lora", "dora", "adalora"),
    "alpha": ("lora", "dora", "adalora"),
    "rank_stabilized": ("lora", "dora"),
    "dropout": ("lora", "adalora"),
    **{f"budget.{key}": ("adalora",) for key in RankBudget.model_fields},
    "bottleneck": ("adapter",),
    "quantize": ("lora", "dora", "adalora", "ia3", "adapter"),
}


def tuning_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Keys that nothing would read, and what tuning does not go with."""
    if recipe.tuning.method is None:
        for key in sorted(key for key in given if key.startswith("tuning.") and "[" not in key and key != METHOD):
            yield Finding((key, METHOD), f"{key} is used only with {METHOD}: give one, or remove it")
        return
    for key, methods in READERS.items():
        if f"tuning.{key}" in given and recipe.tuning.method not in methods:
            yield Finding(
                (f"tuning.{key}", METHOD),
                f"tuning.{key} is used by {', '.join(methods)}, not by {recipe.tuning.method}: remove it",
            )
    if "tuning.merge" in given:
        yield from _merge_findings(recipe)
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


def _merge_findings(recipe: Recipe) -> Iterator[Finding]:
    if recipe.tuning.method == "bitfit":
        yield Finding(
            ("tuning.merge", METHOD),
            "tuning.merge: bitfit trains weights of the model itself, its export is one already: remove it",
        )
    elif recipe.tuning.method == "adapter" and recipe.tuning.merge:
        yield Finding(
            ("tuning.merge", METHOD),
            "tuning.merge: an adapter has a nonlinearity between its projections, so no weight can take it up: remove it, or "
            "take lora, dora, adalora or ia3",
        )
