"""What a recipe may ask of parameter-efficient tuning."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.model.auto_rules import AUTO
from trainer.schema import Finding, RankBudget, Recipe
from trainer.tuning.methods import method_of, names_of_methods

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
    yield from method_of(recipe.tuning).findings(recipe)
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


def _merge_findings(recipe: Recipe) -> Iterator[Finding]:
    method = method_of(recipe.tuning)
    if not method.parts:
        yield Finding(("tuning.merge", METHOD), f"tuning.merge: {method.not_merged}: remove it")
    elif recipe.tuning.merge and not method.merges:
        *names, last = names_of_methods(lambda other: other.merges)
        yield Finding(
            ("tuning.merge", METHOD),
            f"tuning.merge: {method.not_merged}: remove it, or take {', '.join(names)} or {last}",
        )
