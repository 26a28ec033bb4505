"""What a recipe may ask of the tasks beside the next token: classes, masked tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from trainer.recipe.auto import AUTO
from trainer.sections import Finding, Recipe

# Which tasks alone read which key.
TEXTS = ("pretrain", "mlm")
READERS = {"data.classes": ("classify",), "data.mask_fraction": ("mlm",), "data.bos": TEXTS, "data.special_tokens": TEXTS}
BESIDE_LANGUAGE = ("classify", "mlm")


def task_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Keys that nothing would read, and what the task does not go with; `given`: the dotted keys that were written."""
    task = recipe.data.task
    for key, readers in READERS.items():
        if key in given and task not in readers:
            users = " or ".join(f'"{reader}"' for reader in readers)
            yield Finding((key, "data.task"), f"{key} is used only with data.task {users}: remove it")
    if task not in BESIDE_LANGUAGE:
        return
    if recipe.model.family == AUTO:
        yield Finding(
            ("model.family", "data.task"),
            f'data.task "{task}" gives a head of its own to a family that is built here, which "auto" is not: name the family',
        )
    if recipe.train.sample_prompt is not None:
        yield Finding(
            ("train.sample_prompt", "data.task"),
            f'train.sample_prompt is continued by models of the next token, not by data.task "{task}": remove it',
        )
    if task == "classify":
        yield from _class_findings(recipe)


def _class_findings(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    if recipe.train.label_smoothing:
        yield Finding(
            ("train.label_smoothing", "data.task"),
            'train.label_smoothing is divided over a vocabulary, which data.task "classify" does not predict: remove it',
        )
    if not data.isolate_documents:
        yield Finding(
            ("data.isolate_documents", "data.task"),
            'data.isolate_documents false lets a text see others of its sequence: with data.task "classify" legal: true',
        )
    if len(set(data.classes)) < len(data.classes) or len(data.classes) == 1:
        yield Finding(
            ("data.classes",), f"data.classes = {json.dumps(data.classes)}: legal: two or more names, each once; or none"
        )
    if recipe.tuning.method is not None:
        yield Finding(
            ("tuning.method", "data.task"),
            f'tuning.method = "{recipe.tuning.method}" freezes all but what it puts beside the weights, and the head of '
            'data.task "classify" must be trained: remove it',
        )
