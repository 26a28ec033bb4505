"""Keys together: combinations that cannot work, and keys that nothing would read."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.learning_rate import schedule_findings
from trainer.model.auto_rules import AUTO
from trainer.model.new_tokens import new_token_findings
from trainer.recipe.auto import auto_findings
from trainer.recipe.numbers import number_findings
from trainer.recipe.preference import preference_findings
from trainer.recipe.rows import row_findings
from trainer.recipe.tasks import task_findings
from trainer.recipe.translations import translation_findings
from trainer.recipe.tuning import tuning_findings
from trainer.recipe.zero import zero_findings
from trainer.schema import Finding, Recipe

# Which update rules read which key.
OPTIMIZER_KEYS = {"betas": ("adamw", "adam", "lion"), "eps": ("adamw", "adam"), "momentum": ("sgd",)}
# Axes that are in the recipe's format but not yet in the engine.
SINGLE_DEGREE = ("parallel.context",)
# What only tensor parallelism reads.
TENSOR_KEYS = ("parallel.sequence_parallel", "parallel.overlap")
# What only the search for spikes reads.
SPIKE_KEYS = ("guard.spike_window", "guard.spike_threshold")


def section_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Combinations that cannot work, and keys that nothing would read; `given` holds the dotted keys that were written."""
    yield from zero_findings(recipe)
    yield from auto_findings(recipe)
    yield from schedule_findings(recipe.schedule, recipe.train, given)
    yield from _parallel_findings(recipe, given)
    yield from _precision_findings(recipe, given)
    yield from _optimizer_findings(recipe, given)
    yield from number_findings(recipe)
    yield from _evaluation_findings(recipe, given)
    yield from row_findings(recipe, given)
    yield from new_token_findings(recipe)
    yield from translation_findings(recipe, given)
    yield from preference_findings(recipe, given)
    yield from task_findings(recipe, given)
    yield from _guard_findings(recipe, given)
    yield from tuning_findings(recipe, given)


def _parallel_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    for key in SINGLE_DEGREE:
        degree = getattr(recipe.parallel, key.rpartition(".")[2])
        if degree > 1 and recipe.model.family != AUTO:
            yield Finding((key,), f"{key} = {degree}: this version has tensor, pipeline and data parallelism; legal: 1")
    if recipe.parallel.tensor == 1:
        for key in TENSOR_KEYS:
            if key in given and getattr(recipe.parallel, key.rpartition(".")[2]):
                yield Finding((key, "parallel.tensor"), f"{key} is used only with parallel.tensor above 1: remove it")


def _precision_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    scale_keys = sorted(key for key in given if key.startswith("precision.loss_scale."))
    if recipe.precision.dtype != "fp16":
        for key in scale_keys:
            yield Finding(
                (key, "precision.dtype"),
                f'{key} is used only with precision.dtype "fp16", not "{recipe.precision.dtype}": remove it',
            )
    elif recipe.precision.loss_scale.static is not None:
        for key in scale_keys:
            if key != "precision.loss_scale.static":
                message = f"{key} is for dynamic scaling, but precision.loss_scale.static is given: remove one of them"
                yield Finding((key, "precision.loss_scale.static"), message)


def _optimizer_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    for key, users in OPTIMIZER_KEYS.items():
        if f"optimizer.{key}" in given and recipe.optimizer.name not in users:
            yield Finding(
                (f"optimizer.{key}", "optimizer.name"),
                f"optimizer.{key} is used by {', '.join(users)}, not by {recipe.optimizer.name}: remove it",
            )


def _evaluation_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    data = recipe.data
    if recipe.train.eval_every and not data.eval_fraction and not data.eval_sources:
        yield Finding(
            ("train.eval_every", "data.eval_fraction", "data.eval_sources"),
            f"train.eval_every = {recipe.train.eval_every} needs held-out documents: set data.eval_fraction above 0, or "
            "data.eval_sources; or train.eval_every 0",
        )
    if recipe.train.label_smoothing and data.task == "preference":
        yield Finding(
            ("train.label_smoothing", "data.task"),
            'train.label_smoothing smooths labels of tokens, and data.task "preference" has none: remove it, or set '
            "preference.label_smoothing",
        )
    if recipe.train.label_smoothing and recipe.model.family == AUTO:
        yield Finding(
            ("train.label_smoothing", "model.family"),
            f'train.label_smoothing is used by the families that are our own, not by model.family "{AUTO}": remove it',
        )
    if data.eval_sources and "data.eval_fraction" in given and data.eval_fraction:
        yield Finding(
            ("data.eval_fraction", "data.eval_sources"),
            "data.eval_fraction holds out documents of data.sources, but data.eval_sources is given: remove one of them",
        )


def _guard_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    if recipe.guard.on_spike == "off":
        for key in SPIKE_KEYS:
            if key in given:
                yield Finding((key, "guard.on_spike"), f'{key} is used only with guard.on_spike other than "off": remove it')
    if recipe.guard.on_spike == "skip" and recipe.zero.stage:
        yield Finding(
            ("guard.on_spike", "zero.stage"),
            f'guard.on_spike "skip" works at zero.stage 0, not {recipe.zero.stage}, where DeepSpeed learns the norm only while '
            'it applies the gradient: legal: "off", "warn", "rewind"',
        )
    if recipe.guard.on_spike == "rewind" and not recipe.checkpoint.every:
        yield Finding(
            ("guard.on_spike", "checkpoint.every"),
            'guard.on_spike "rewind" goes back to a checkpoint, and checkpoint.every 0 keeps none: set checkpoint.every',
        )
