"""Rules about keys together: combinations that cannot work, and keys that nothing would read."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.learning_rate import schedule_findings
from trainer.model.new_tokens import new_token_findings
from trainer.recipe.auto import auto_findings
from trainer.recipe.best import best_findings
from trainer.recipe.numbers import number_findings
from trainer.recipe.only import only_findings
from trainer.recipe.tasks import task_findings
from trainer.recipe.tuning import tuning_findings
from trainer.recipe.zero import zero_findings
from trainer.schema import Finding, Recipe
from trainer.tasks import TASKS

# axes that are in the recipe's format but not yet in the engine
SINGLE_DEGREE = ("parallel.context",)


def section_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Yield a finding for each combination that cannot work, and for each key that nothing would
    read.

    `given` holds the dotted keys that were written.
    """
    yield from only_findings(recipe, given)
    yield from zero_findings(recipe)
    yield from auto_findings(recipe)
    yield from _length_findings(recipe)
    yield from _micro_batch_findings(recipe)
    yield from schedule_findings(recipe.schedule, recipe.train)
    yield from _parallel_findings(recipe)
    yield from _loss_scale_findings(recipe, given)
    yield from number_findings(recipe)
    yield from _evaluation_findings(recipe, given)
    yield from best_findings(recipe)
    yield from new_token_findings(recipe)
    yield from task_findings(recipe, given)
    yield from _guard_findings(recipe)
    yield from tuning_findings(recipe)


def _length_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding where a recipe says twice how long the run is."""
    keys = recipe.train
    if keys.steps is not None and keys.epochs is not None:
        yield Finding(
            ("train.epochs", "train.steps"),
            f"train.epochs = {keys.epochs:g} and train.steps = {keys.steps} both say how long the run is: remove one of them; "
            "null takes back one that is inherited (--set train.steps=null)",
        )


def _micro_batch_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding where a recipe gives what the first start is to find."""
    size = "batch.micro_sequences"
    if recipe.train.auto_micro_batch and recipe.batch.micro_sequences > 1:
        yield Finding(
            ("train.auto_micro_batch", size),
            f"train.auto_micro_batch finds {size}, but {size} = {recipe.batch.micro_sequences} is given: remove one of them; "
            f"null takes back one that is inherited (--set {size}=null)",
        )


def _parallel_findings(recipe: Recipe) -> Iterator[Finding]:
    for key in SINGLE_DEGREE:
        degree = getattr(recipe.parallel, key.rpartition(".")[2])
        if degree > 1:
            yield Finding((key,), f"{key} = {degree}: this version has tensor, pipeline and data parallelism; legal: 1")


def _loss_scale_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    static = "precision.loss_scale.static"
    if recipe.precision.dtype != "fp16" or recipe.precision.loss_scale.static is None:
        return
    for key in sorted(key for key in given if key.startswith("precision.loss_scale.")):
        if key != static:
            message = f"{key} is for dynamic scaling, but {static} is given: remove one of them"
            yield Finding((key, static), message)


def _evaluation_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    data = recipe.data
    if recipe.train.eval_every and not data.eval_fraction and not data.eval_sources:
        yield Finding(
            ("train.eval_every", "data.eval_fraction", "data.eval_sources"),
            f"train.eval_every = {recipe.train.eval_every} needs held-out documents: set data.eval_fraction above 0, or "
            "data.eval_sources; or train.eval_every 0",
        )
    if recipe.train.eval_translations and not data.eval_sources and TASKS[data.task].translates:
        yield Finding(
            ("train.eval_translations", "data.eval_sources"),
            f"train.eval_translations = {recipe.train.eval_translations} compares translations with those of "
            "data.eval_sources, and there are none: give them, or train.eval_translations 0",
        )
    if data.eval_sources and "data.eval_fraction" in given and data.eval_fraction:
        yield Finding(
            ("data.eval_fraction", "data.eval_sources"),
            "data.eval_fraction holds out documents of data.sources, but data.eval_sources is given: remove one of them",
        )


def _guard_findings(recipe: Recipe) -> Iterator[Finding]:
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
