"""The tasks that learn from rows. All others learn from texts, joined end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer import schema
from trainer.data.chat import Chat
from trainer.data.conversations import ChatRows
from trainer.data.examples import Examples
from trainer.data.labelled import Labelled, LabelledRows
from trainer.data.pairs import PairRows
from trainer.data.preferences import Preferences
from trainer.data.row_format import RowFormat
from trainer.data.texts import Texts
from trainer.data.tokenizer import Tokenizer
from trainer.data.translations import TranslationRows, Translations


class Task(NamedTuple):
    """A task that learns from rows. `format` reads them, `examples` writes what was read; see
    `examples.py`."""

    format: type[RowFormat]
    examples: type[Examples]


ROW_TASKS: Mapping[str, Task] = {
    "sft": Task(ChatRows, Chat),
    "preference": Task(PairRows, Preferences),
    "translate": Task(TranslationRows, Translations),
    "classify": Task(LabelledRows, Labelled),
}


def examples_of(data: schema.Data, tokenizer: Tokenizer) -> Examples | None:
    """Return the writer of the task's examples, or None for a task that learns from texts."""
    task = ROW_TASKS.get(data.task)
    return task.examples.from_recipe(data, tokenizer) if task else None


def written_again(task: str, tokenizer: Tokenizer, settings: dict[str, Any]) -> Texts | Examples:
    """Rebuild, in another process, the task's writer of texts or examples from its settings."""
    return ROW_TASKS[task].examples(tokenizer, **settings) if task in ROW_TASKS else Texts.from_settings(settings)
