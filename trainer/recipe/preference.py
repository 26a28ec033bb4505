"""What a recipe may ask of learning from preferences."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.model.auto_rules import AUTO
from trainer.schema import Finding, Recipe

TASK = "data.task"
READERS = {"label_smoothing": ("dpo",)}  # which losses read which key


def preference_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Keys that nothing would read, and what learning from pairs does not go with; `given`: the dotted keys written."""
    keys = sorted(key for key in given if key.startswith("preference."))
    if recipe.data.task != "preference":
        for key in keys:
            yield Finding((key, TASK), f'{key} is used only with {TASK} "preference": remove it')
        return
    for name, losses in READERS.items():
        if f"preference.{name}" in given and recipe.preference.loss not in losses:
            yield Finding(
                (f"preference.{name}", "preference.loss"),
                f"preference.{name} is used by {', '.join(losses)}, not by {recipe.preference.loss}: remove it",
            )
    if not recipe.data.isolate_documents:
        yield Finding(
            ("data.isolate_documents", TASK),
            f'data.isolate_documents = false: the answers that {TASK} "preference" compares lie in one row and must not attend '
            "to each other: remove it",
        )
    if recipe.model.family == AUTO:
        yield Finding(
            ("model.family", TASK),
            f'{TASK} = "preference" learns with our own output layer, which family "auto" does not have: take one of the '
            "families that are built here",
        )
