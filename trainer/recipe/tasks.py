"""Rules of a recipe's task: sources that hold its rows, and keys of which it takes one value."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from trainer.recipe.names import tokenizer_is_ours
from trainer.schema import STDLIB, Finding, Recipe, Source
from trainer.tasks import TASKS, Task

KEY = "data.task"


def task_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Yield a finding for each key that does not go with the task.

    `given` holds the dotted keys that were written.
    """
    task = TASKS[recipe.data.task]
    yield from _legal_findings(recipe, task)
    yield from _source_findings(recipe, task, given)
    yield from _class_findings(recipe)
    least, why = task.shortest
    if recipe.data.seq_len < least:
        yield Finding(
            ("data.seq_len", KEY),
            f"data.seq_len = {recipe.data.seq_len} has no room for {why}: legal with {_said(recipe)}: {least} or more",
        )
    if recipe.data.bos and tokenizer_is_ours(recipe.data.tokenizer):
        yield Finding(
            ("data.bos", "data.tokenizer"),
            f"data.bos = true, but the tokenizer {recipe.data.tokenizer} has no bos_token: remove data.bos, or give a "
            "tokenizer that has one",
        )


def _said(recipe: Recipe) -> str:
    return f"{KEY} {json.dumps(recipe.data.task)}"


def _legal_findings(recipe: Recipe, task: Task) -> Iterator[Finding]:
    for key, legal in task.legal.items():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value != legal.value:
            yield Finding(
                (key, KEY),
                f"{key} = {json.dumps(value)} does not go with {_said(recipe)}: {legal.reason}; legal: "
                f"{'none' if legal.value is None else json.dumps(legal.value)}",
            )


def _source_findings(recipe: Recipe, task: Task, given: Collection[str]) -> Iterator[Finding]:
    # Sources that were written wrong are reported elsewhere.
    written = any(key.startswith("data.sources") for key in given)
    if task.rows and not written and any(source.path == STDLIB for source in recipe.data.sources):
        yield Finding(
            ("data.sources", KEY),
            f'data.sources is "{STDLIB}", source code, which holds no {task.rows}: {_said(recipe)} needs data.sources with '
            f"{'pairs' if task.translates else 'rows'}, such as {task.sources}",
        )
    for group in ("sources", "eval_sources"):
        for number, source in enumerate(getattr(recipe.data, group)):
            where = f"data.{group}[{number}]"
            yield from _row_findings(source, where, task) if task.rows else _text_findings(source, where)
            if group == "eval_sources" and source.weight is not None and f"{where}.weight" in given:
                message = f"{where}.weight: evaluation takes sources in proportion to their tokens: remove it"
                yield Finding((f"{where}.weight",), message)


def _text_findings(source: Source, where: str) -> Iterator[Finding]:
    if source.columns and source.text_field not in source.columns:
        columns, wanted = ", ".join(map(json.dumps, source.columns)), json.dumps(source.text_field)
        yield Finding(
            (f"{where}.columns", f"{where}.field"),
            f"{where}.columns has no {wanted} ({columns}): name the one that holds the text in {where}.field",
        )


def _row_findings(source: Source, where: str, task: Task) -> Iterator[Finding]:
    named = {*source.names}
    shapes = {shape: names for shape, names in task.shapes.items() if source.shape in (None, shape)} or task.shapes
    known = {name for names in task.shapes.values() for name in names}
    if named <= known and not any(named <= {*names} for names in shapes.values()):
        legal = "; ".join(f"{', '.join(names)} ({shape})" for shape, names in shapes.items())
        yield Finding(
            (f"{where}.fields", f"{where}.shape"),
            f"{where}.fields names {json.dumps(sorted(named))}, not of one shape; legal: {legal}",
        )
    for name in ("fields", "columns"):
        if source.target_path is not None and getattr(source, name):
            message = f"{where}.{name} names what rows have, but with {where}.target_path there are lines: remove one of them"
            yield Finding((f"{where}.{name}", f"{where}.target_path"), message)


def _class_findings(recipe: Recipe) -> Iterator[Finding]:
    classes = recipe.data.classes
    if len(set(classes)) < len(classes) or len(classes) == 1:
        message = f"data.classes = {json.dumps(classes)}: legal: two or more names, each once; or none"
        yield Finding(("data.classes",), message)
    if unread := [name for name in classes if name != name.strip()]:
        message = f"data.classes has {json.dumps(unread[0])}, but labels are read without white space around them: remove it"
        yield Finding(("data.classes",), message)
