"""Rules of parameter-efficient tuning in a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.schema import Finding, Recipe
from trainer.tuning.methods import method_of

METHOD = "tuning.method"


def tuning_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding for each key that does not go with tuning."""
    if recipe.tuning.method is None:
        return
    yield from method_of(recipe.tuning).findings(recipe)
    if recipe.zero.offload_param.device == "nvme":
        yield Finding(
            ("zero.offload_param.device", METHOD),
            f'zero.offload_param.device = "nvme": DeepSpeed 0.19 runs out of swap buffers where weights are frozen ({METHOD}); '
            'legal: "cpu" or "none"',
        )
