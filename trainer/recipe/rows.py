"""Where the keys of rows and those of texts do not go together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from trainer.schema import STDLIB, Finding, Recipe, Source

# Which tasks read which key of a source.
READERS = {
    "field": ("pretrain", "mlm"),
    "shape": ("sft",),
    "fields": ("sft", "preference", "classify"),
    "columns": ("pretrain", "mlm", "sft", "preference", "translate", "classify"),
}
# What the rows of a task are, in which shapes, and which names each shape needs and may have.
ROWS = {"sft": "conversations", "preference": "pairs", "classify": "labelled texts"}
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": {
        "messages": ("messages", "system", "tools"),
        "sharegpt": ("conversations", "system", "tools"),
        "prompt": ("prompt", "completion", "system", "tools"),
        "alpaca": ("instruction", "input", "output", "history", "system", "tools"),
    },
    "preference": {"pairs": ("prompt", "chosen", "rejected", "system", "tools")},
    "classify": {"labelled": ("text", "label")},
}


def row_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """`given`: the dotted keys that were written."""
    task = recipe.data.task
    if task in ROWS and reads_stdlib(recipe, given):
        yield Finding(
            ("data.sources", "data.task"),
            f'data.sources is "{STDLIB}", source code, which holds no {ROWS[task]}: data.task "{task}" '
            'needs data.sources with rows, such as [{"path": "rows.jsonl"}]',
        )
    if task != "sft" and "data.learn" in given:
        yield Finding(("data.learn", "data.task"), 'data.learn is used only with data.task "sft": remove it')
    if recipe.data.task == "translate":  # whose sources have keys of their own
        return
    for group in ("sources", "eval_sources"):
        for number, source in enumerate(getattr(recipe.data, group)):
            yield from _source_findings(source, f"data.{group}[{number}]", recipe.data.task, given)


def reads_stdlib(recipe: Recipe, given: Collection[str]) -> bool:
    """Because no other sources are given; those that were written wrong are spoken of elsewhere."""
    written = any(key.startswith("data.sources") for key in given)
    return not written and any(source.path == STDLIB for source in recipe.data.sources)


def _source_findings(source: Source, where: str, task: str, given: Collection[str]) -> Iterator[Finding]:
    for name, readers in READERS.items():
        if task not in readers and f"{where}.{name}" in given:
            hint = "; what rows call their fields is said in fields" if name == "field" else ""
            users = " or ".join(f'"{user}"' for user in readers)
            yield Finding(
                (f"{where}.{name}", "data.task"), f"{where}.{name} is used only with data.task {users}: remove it{hint}"
            )
    if task in READERS["field"] and source.columns and source.text_field not in source.columns:
        columns, wanted = ", ".join(map(json.dumps, source.columns)), json.dumps(source.text_field)
        yield Finding(
            (f"{where}.columns", f"{where}.field"),
            f"{where}.columns has no {wanted} ({columns}): name the one that holds the text in {where}.field",
        )
    if task not in NAMES:
        return
    named = set(source.names)
    shapes = {shape: names for shape, names in NAMES[task].items() if source.shape in (None, shape)} or NAMES[task]
    if not any(named <= set(names) for names in shapes.values()):
        legal = "; ".join(f"{', '.join(names)} ({shape})" for shape, names in shapes.items())
        yield Finding(
            (f"{where}.fields", f"{where}.shape"),
            f"{where}.fields names {json.dumps(sorted(named))}, not of one shape; legal: {legal}",
        )
