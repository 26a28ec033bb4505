"""The rows of preference data, read as pairs of conversations: the shapes a row may have, and the
faults of one that has none.

    prompt     {"prompt": "…", "chosen": "…", "rejected": "…"}, texts, or lists of messages
    messages   {"chosen": [message, …], "rejected": [message, …]}: whole conversations; a prompt
               beside them may repeat their beginning
    dialogue   {"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}: the same as texts,
               as in Anthropic's HH

Each may have "system", a text. The prompt is what both conversations have in common at their
beginning: only what follows is learned. Files that name these fields differently are read through
`fields`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer import schema
from trainer.data.conversations import (
    SURROUNDINGS,
    Conversation,
    Message,
    Turns,
    asked,
    read_side,
    read_system,
    with_surroundings,
)
from trainer.data.fault import Fault, kind_of
from trainer.data.row_format import RowFormat, renamed

ANSWERS = ("chosen", "rejected")
DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """A pair of conversations that begin alike; the answer is what counts in each."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class PairRows(RowFormat):
    """The way in which the rows of a source become pairs. `fields`: our name of a field → its name
    in this source."""

    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_source(cls, source: schema.Source) -> PairRows:
        return cls(source.names)

    def example_of(self, row: Mapping[str, Any]) -> Pair:
        named = renamed(row, self.fields)
        if missing := [self.fields.get(name, name) for name in ANSWERS if named.get(name) is None]:
            raise Fault(
                f"no pair: it has {', '.join(map(repr, row)) or 'no field'}, and no {' and no '.join(map(repr, missing))}; "
                'fix the row, or name its fields in data.sources[].fields, such as {"chosen": "better", "rejected": "worse"}'
            )
        prompt = read_side(named["prompt"], "prompt", "user") if named.get("prompt") is not None else ()
        chosen, rejected = (_conversation(prompt, named[name], name) for name in ANSWERS)
        alike = _begins_alike(chosen, rejected)
        both = ((*read_system(named), *asked(turns[:alike]), *turns[alike:]) for turns in (chosen, rejected))
        return Pair(*(with_surroundings(turns, named) for turns in both))

    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        return {self.fields.get(name, name) for name in ("prompt", "system", *ANSWERS, *SURROUNDINGS)}

    def texts_of(self, example: Pair) -> Iterator[str]:
        yield from (turn.content for turn in example.chosen.turns)
        yield from (turn.content for turn in example.rejected.turns if turn.counts)


def _conversation(prompt: Turns, answer: Any, name: str) -> Turns:
    """Return prompt and answer as one conversation. A list of messages that begins before the
    assistant speaks already contains the prompt."""
    if isinstance(answer, str) and not prompt:
        return _dialogue(answer, name)
    turns = read_side(answer, name, "assistant")
    return (*prompt, *turns) if not turns or turns[0].role == "assistant" else turns


def _dialogue(text: str, name: str) -> Turns:
    before, *parts = DIALOGUE.split(text)
    if before.strip() or not parts:
        raise Fault(
            f"{name!r} is {kind_of(text)} without a 'prompt' beside it, and does not begin with a blank line and Human:; "
            "fix the row, or name its fields in data.sources[].fields"
        )
    roles = [SPEAKERS[speaker] for speaker in parts[::2]]
    return tuple(Message(role, content.strip(), role == "assistant") for role, content in zip(roles, parts[1::2], strict=True))


def _begins_alike(chosen: Turns, rejected: Turns) -> int:
    """Return the number of turns that both have in common at their beginning."""
    told = [Conversation(turns).told for turns in (chosen, rejected)]
    return next((n for n, (one, other) in enumerate(zip(*told, strict=False)) if one != other), min(map(len, told)))
