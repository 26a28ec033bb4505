"""Rows of chat data → conversations. What a row must look like, and what is said of one that does not.

    messages     {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    prompt       {"prompt": "…", "completion": "…"}, texts, or lists of messages
    sharegpt     {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    alpaca       {"instruction": "…", "input": "…", "output": "…"}; input may be missing or empty

Each but the first may have "system", a text. Files that name these fields otherwise are read through `fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer import sections
from trainer.data.fault import Fault, kind_of, require_characters
from trainer.data.row_format import RowFormat, renamed

# Other words for the roles, as they are found in published data.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"function": "tool", "observation": "tool", "developer": "system"},
}
# Unicode's 32 code points that are never characters, used as marks in rendered conversations.
NONCHARACTERS = range(0xFDD0, 0xFDF0)


@dataclass(frozen=True)
class Message:
    """One turn. `counts`: an assistant's turn that is to be learned."""

    role: str
    content: str
    counts: bool


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class ChatRows(RowFormat):
    """How the rows of a source become conversations.

    `shape`: a key of SHAPES; "": by the fields that a row has. `fields`: our name of a field → the name in this source.
    """

    shape: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_source(cls, source: sections.Source) -> ChatRows:
        return cls(source.shape or "", source.names)

    def example_of(self, row: Mapping[str, Any]) -> Conversation:
        shape = self._shape_of(row)
        return SHAPES[shape].read(renamed(row, self.fields))

    def texts_of(self, example: Conversation) -> Iterator[str]:
        yield from (message.content for message in example)

    def _shape_of(self, row: Mapping[str, Any]) -> str:
        has = {ours for ours, theirs in self.fields.items() if row.get(theirs) is not None}
        has |= {name for name in row if name not in self.fields and row[name] is not None}
        candidates = [self.shape] if self.shape else list(SHAPES)
        if self.fields and not self.shape:  # what is renamed says which shape is meant
            candidates = [name for name in candidates if self.fields.keys() <= SHAPES[name].all_names]
        fitting = [name for name in candidates if has.issuperset(SHAPES[name].needs)]
        if fitting:
            return fitting[0]
        wanted = " or ".join(self._described(name) for name in candidates)
        raise Fault(
            f"no conversation: it has {', '.join(map(repr, row)) or 'no field'}, and needs {wanted}; mend the row, or name its "
            'fields in data.sources[].fields, such as {"prompt": "question", "completion": "answer"}'
        )

    def _described(self, shape: str) -> str:
        return " + ".join(repr(self.fields.get(name, name)) for name in SHAPES[shape].needs) + f" ({shape})"


def _read_messages(row: Mapping[str, Any]) -> Conversation:
    return (*read_system(row), *_messages(row["messages"], "messages", ("role", "content")))


def _read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = row["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0] and "from" not in turns[0]:
        return (*read_system(row), *_messages(turns, "conversations", ("role", "content")))
    return (*read_system(row), *_messages(turns, "conversations", ("from", "value")))


def _read_prompt(row: Mapping[str, Any]) -> Conversation:
    return (
        *read_system(row),
        *read_side(row["prompt"], "prompt", "user"),
        *read_side(row["completion"], "completion", "assistant"),
    )


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, more = _text(row["instruction"], "'instruction'"), row.get("input")
    if more:
        instruction = f"{instruction}\n\n{_text(more, repr('input'))}"
    answer = _text(row["output"], "'output'")
    return (*read_system(row), Message("user", instruction, False), Message("assistant", answer, True))


@dataclass(frozen=True)
class Shape:
    """`needs`: fields that a row of this shape has; `may`: fields that it may have."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]

    @property
    def all_names(self) -> set[str]:
        return {*self.needs, *self.may}


# In the order in which a row is tried: data sets that give a conversation and its first prompt mean the conversation.
SHAPES = {
    "messages": Shape(("messages",), ("system",), _read_messages),
    "sharegpt": Shape(("conversations",), ("system",), _read_sharegpt),
    "prompt": Shape(("prompt", "completion"), ("system",), _read_prompt),
    "alpaca": Shape(("instruction", "output"), ("input", "system"), _read_alpaca),
}


def read_system(row: Mapping[str, Any]) -> Conversation:
    """What is said before the first turn."""
    system = row.get("system")
    return (Message("system", _text(system, "'system'"), False),) if system else ()


def read_side(value: Any, name: str, role: str) -> Conversation:
    """A prompt or a completion: a text, or a list of messages; what is in a prompt is not learned."""
    if isinstance(value, list):
        turns = _messages(value, name, ("role", "content"))
        return turns if role == "assistant" else tuple(Message(turn.role, turn.content, False) for turn in turns)
    return (Message(role, _text(value, repr(name)), role == "assistant"),)


def _messages(value: Any, name: str, keys: tuple[str, str]) -> Conversation:
    if not isinstance(value, list):
        raise Fault(f"{name!r} is {kind_of(value)}, not a list of turns {_turn(keys)}; mend the row")
    return tuple(_message(turn, f"{name}[{number}]", keys) for number, turn in enumerate(value))


def _message(turn: Any, place: str, keys: tuple[str, str]) -> Message:
    if not isinstance(turn, dict) or not turn.keys() >= set(keys):
        has = f"has {', '.join(map(repr, turn)) or 'no field'}" if isinstance(turn, dict) else f"is {kind_of(turn)}"
        raise Fault(f"{place} {has}; a turn is {_turn(keys)}; mend the row")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Fault(f"{place} calls tools, which this version does not train; remove the row")
    spelling = turn[keys[0]]
    role = ROLES.get(spelling) if isinstance(spelling, str) else None
    if role is None:
        legal = ", ".join(ROLES)
        raise Fault(f"{place}: {keys[0]} is {str(spelling)[:40]!r}; legal: {legal}; mend the row")
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise Fault(f"{place}: weight is {str(weight)[:40]!r}; legal: 1 (learned) and 0 (not); mend the row")
    content = _text(_joined(turn[keys[1]]), f"{place}: {keys[1]}")
    return Message(role, content, role == "assistant" and weight != 0)


def _joined(content: Any) -> Any:
    """A content given in parts, [{"type": "text", "text": "…"}], as one text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


def _turn(keys: tuple[str, str]) -> str:
    return f'{{"{keys[0]}": "…", "{keys[1]}": "…"}}'


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Fault(f"{what} is {kind_of(value)}, not text; mend or remove the row")
    for letter in value if not value.isascii() else "":
        if ord(letter) in NONCHARACTERS:
            raise Fault(f"{what} holds U+{ord(letter):04X}, which Unicode keeps for programs' own marks; remove it")
    return require_characters(value, what)
