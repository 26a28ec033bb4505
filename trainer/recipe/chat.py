"""Where the keys of conversations and those of texts do not go together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from trainer.sections import Finding, Recipe, Source

TEXT = ("field",)  # keys of a source that only texts have
CONVERSATIONS = ("shape", "fields")
# Which shape needs and may have which names.
NAMES = {
    "messages": ("messages", "system"),
    "sharegpt": ("conversations", "system"),
    "prompt": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
}


def chat_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """`given`: the dotted keys that were written."""
    is_chat = recipe.data.task == "sft"
    if is_chat and not any(key.startswith("data.sources") for key in given):
        yield Finding(
            ("data.sources", "data.task"),
            'data.sources is "stdlib" where it is not given, source code, which holds no conversations: data.task "sft" needs '
            'data.sources with rows, such as [{"path": "chats.jsonl"}]',
        )
    if not is_chat and "data.learn" in given:
        yield Finding(("data.learn", "data.task"), 'data.learn is used only with data.task "sft": remove it')
    if recipe.data.task == "translate":  # whose sources have keys of their own
        return
    for group in ("sources", "eval_sources"):
        for number, source in enumerate(getattr(recipe.data, group)):
            yield from _source_findings(source, f"data.{group}[{number}]", recipe.data.task, given)


def _source_findings(source: Source, where: str, task: str, given: Collection[str]) -> Iterator[Finding]:
    unused, user = (TEXT, "pretrain") if task == "sft" else (CONVERSATIONS, "sft")
    for name in unused:
        if any(key == f"{where}.{name}" or key.startswith(f"{where}.{name}.") for key in given):
            hint = "; what rows call their fields is said in fields" if name == "field" else ""
            yield Finding(
                (f"{where}.{name}", "data.task"), f'{where}.{name} is used only with data.task "{user}": remove it{hint}'
            )
    named = set(source.fields.model_dump(exclude_none=True)) if source.fields else set()
    shapes = {source.shape: NAMES[source.shape]} if source.shape else NAMES
    if not any(named <= set(names) for names in shapes.values()):
        legal = "; ".join(f"{', '.join(names)} ({shape})" for shape, names in shapes.items())
        yield Finding(
            (f"{where}.fields", f"{where}.shape"),
            f"{where}.fields names {json.dumps(sorted(named))}, not of one shape; legal: {legal}",
        )
