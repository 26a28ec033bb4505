"""What a recipe may ask of the tasks beside the next token: classes, masked tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from trainer.model.auto_rules import AUTO
from trainer.recipe.names import tokenizer_is_ours
from trainer.schema import Finding, Recipe

# Which tasks alone read which key.
TEXTS = ("pretrain", "mlm")
READERS = {
    "data.classes": ("classify",),
    "data.mask_fraction": ("mlm",),
    **dict.fromkeys(("data.bos", "data.special_tokens", "data.tails"), TEXTS),
}
BESIDE_LANGUAGE = ("classify", "mlm")


def task_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Keys that nothing would read, and what the task does not go with; `given`: the dotted keys that were written."""
    task = recipe.data.task
    for key, readers in READERS.items():
        if key in given and task not in readers:
            users = " or ".join(f'"{reader}"' for reader in readers)
            yield Finding((key, "data.task"), f"{key} is used only with data.task {users}: remove it")
    if recipe.data.bos and tokenizer_is_ours(recipe.data.tokenizer):
        yield Finding(
            ("data.bos", "data.tokenizer"),
            f"data.bos = true, but the tokenizer {recipe.data.tokenizer} has no bos_token: remove data.bos, or give a "
            "tokenizer that has one",
        )
    for number, source in enumerate(recipe.data.eval_sources):
        if source.weight is not None and f"data.eval_sources[{number}].weight" in given:
            key = f"data.eval_sources[{number}].weight"
            yield Finding((key,), f"{key}: evaluation takes sources in proportion to their tokens: remove it")
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
    if unread := [name for name in data.classes if name != name.strip()]:
        message = f"data.classes has {json.dumps(unread[0])}, but labels are read without white space around them: remove it"
        yield Finding(("data.classes",), message)
    if recipe.tuning.method is not None:
        yield Finding(
            ("tuning.method", "data.task"),
            f'tuning.method = "{recipe.tuning.method}" freezes all but what it puts beside the weights, and the head of '
            'data.task "classify" must be trained: remove it',
        )
