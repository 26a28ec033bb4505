"""The rows of chat data, read as conversations: the shapes a row may have, and the faults of one
that has none.

    messages     {"messages": [{"role": "user", "content": "…"},
                               {"role": "assistant", "content": "…"}]}
    prompt       {"prompt": "…", "completion": "…"}, texts, or lists of messages
    sharegpt     {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    alpaca       {"instruction": "…", "input": "…", "output": "…"}; input may be missing or empty,
                 "history" has earlier turns

Each may have "system", a text, "tools", and "chat_template_kwargs". Files that name these
differently are read through `fields`. A turn's other keys (thoughts, calls of tools, a name) go to
the chat template as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainer import schema
from trainer.data.fault import Fault, kind_of, require_characters
from trainer.data.row_format import RowFormat, renamed

# Names of the roles that occur in published data. CALLS: an assistant's turn whose content is what
# it calls.
CALLS = "function_call"
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool"},
    **{CALLS: "assistant", "tool_call": "assistant", "developer": "system"},
}
CALLING_ROLES = (CALLS, "tool_call")
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # transformers' names of the thought before an answer
# Keys of a turn that say whether it is learned. Weights are 1 or 0; "mask" is true where a turn is
# not learned. With FLAGS_OF_ANY_ROLE turns of other roles can be learned too.
WEIGHTS = ("weight", "loss_weight")
FLAGS = ("loss", "train", "trainable", "do_train")
FLAGS_OF_ANY_ROLE = ("train", "trainable", "do_train")
MASK = "mask"
# A row's options for its template, such as {"enable_thinking": false}.
OPTIONS = "chat_template_kwargs"
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Unicode's 32 code points that are never characters, used as marks in rendered conversations.
NONCHARACTERS = range(0xFDD0, 0xFDF0)


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    `counts`: it is to be learned. `parts`: the texts in which its content was given, if there are
    several. `keys`: what else it has for the template; {"content": None} if it has no content.
    """

    role: str
    content: str
    counts: bool
    parts: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Return whether there is something to learn: a text, a call or a thought."""
        return bool(self.content.strip() or self.calls or self.thought)

    @property
    def calls(self) -> list[Any]:
        """The turn's calls of tools."""
        return list(self.keys.get("tool_calls") or ())

    @property
    def thought(self) -> str:
        """The thought before the answer, given in a key of its own; "" if there is none."""
        return next((str(self.keys[name]) for name in REASONING if self.keys.get(name) is not None), "")


Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """A sequence of turns, the tools that they may call, and the row's options for the template."""

    turns: Turns
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> list[Any]:
        """The conversation's content as JSON values: equal for conversations that say the same."""
        told: list[Any] = [_told(turn) for turn in self.turns]
        return told if not self.tools else [*told, {"tools": self.tools}]


def _told(turn: Message) -> list[Any]:
    more = {name: turn.keys[name] for name in ("tool_calls", *REASONING) if turn.keys.get(name) is not None}
    return [turn.role, turn.content, *([more] if more else [])]


@dataclass(frozen=True)
class ChatRows(RowFormat):
    """The way in which the rows of a source become conversations.

    `shape`: a key of SHAPES, or "" to decide by the fields that a row has. `fields`: our name of a
    field → its name in this source.
    """

    shape: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_source(cls, source: schema.Source) -> ChatRows:
        return cls(source.shape or "", source.names)

    def example_of(self, row: Mapping[str, Any]) -> Conversation:
        shape, named = self._shape_of(row), renamed(row, self.fields)
        return with_surroundings(SHAPES[shape].read(named), named)

    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        names = {*SHAPES[self._shape_of(row)].all_names, *SURROUNDINGS}
        return {self.fields.get(name, name) for name in names}

    def texts_of(self, example: Conversation) -> Iterator[str]:
        for message in example.turns:
            yield from (text for text in (message.thought, message.content) if text)

    def _shape_of(self, row: Mapping[str, Any]) -> str:
        has = {ours for ours, theirs in self.fields.items() if row.get(theirs) is not None}
        has |= {name for name in row if name not in self.fields and row[name] is not None}
        candidates = [self.shape] if self.shape else list(SHAPES)
        named = self.fields.keys() - SURROUNDINGS
        if named and not self.shape:  # the renamed fields say which shape is meant
            candidates = [name for name in candidates if named <= SHAPES[name].all_names]
        fitting = [name for name in candidates if has.issuperset(SHAPES[name].needs)]
        if fitting:
            return fitting[0]
        wanted = " or ".join(self._described(name) for name in candidates)
        raise Fault(
            f"no conversation: it has {', '.join(map(repr, row)) or 'no field'}, and needs {wanted}; fix the row, or name its "
            'fields in data.sources[].fields, such as {"prompt": "question", "completion": "answer"}'
        )

    def _described(self, shape: str) -> str:
        return " + ".join(repr(self.fields.get(name, name)) for name in SHAPES[shape].needs) + f" ({shape})"


def _read_messages(row: Mapping[str, Any]) -> Turns:
    return (*read_system(row), *_messages(row["messages"], "messages", ("role", "content")))


def _read_sharegpt(row: Mapping[str, Any]) -> Turns:
    turns = row["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0] and "from" not in turns[0]:
        return (*read_system(row), *_messages(turns, "conversations", ("role", "content")))
    return (*read_system(row), *_messages(turns, "conversations", ("from", "value")))


def _read_prompt(row: Mapping[str, Any]) -> Turns:
    return (
        *read_system(row),
        *read_side(row["prompt"], "prompt", "user"),
        *read_side(row["completion"], "completion", "assistant"),
    )


def _read_alpaca(row: Mapping[str, Any]) -> Turns:
    instruction, more = _text(row["instruction"], "'instruction'"), row.get("input")
    if more:
        instruction = f"{instruction}\n\n{_text(more, repr('input'))}"
    answer = _text(row["output"], "'output'")
    asked, answered = Message("user", instruction, False), Message("assistant", answer, True)
    return (*read_system(row), *_history(row.get("history")), asked, answered)


def _history(value: Any) -> Iterator[Message]:
    """Yield the earlier turns, given as pairs of question and answer."""
    if not isinstance(value or [], list):
        raise Fault(f'\'history\' is {kind_of(value)}, not a list of pairs ["question", "answer"]; fix the row')
    for number, pair in enumerate(value or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f'history[{number}] is not a pair ["question", "answer"]; fix the row')
        yield Message("user", _text(pair[0], f"history[{number}][0]"), False)
        yield Message("assistant", _text(pair[1], f"history[{number}][1]"), True)


@dataclass(frozen=True)
class Shape:
    """A form of rows. `needs`: fields that every such row has; `may`: fields that it may have."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Turns]

    @property
    def all_names(self) -> set[str]:
        return {*self.needs, *self.may}


# In the order in which they are tried on a row: a row with both a conversation and its first prompt
# means the conversation.
SHAPES = {
    "messages": Shape(("messages",), ("system",), _read_messages),
    "sharegpt": Shape(("conversations",), ("system",), _read_sharegpt),
    "prompt": Shape(("prompt", "completion"), ("system",), _read_prompt),
    "alpaca": Shape(("instruction", "output"), ("input", "history", "system"), _read_alpaca),
}
# Fields a row of any shape may have.
SURROUNDINGS = frozenset({"tools", "functions", OPTIONS, *MEDIA})


def with_surroundings(turns: Turns, row: Mapping[str, Any]) -> Conversation:
    """Return the turns of a row with its tools and options. Fault for pictures and sounds."""
    if media := [name for name in MEDIA if row.get(name)]:
        raise Fault(f"it has {media[0]!r}, and texts alone are trained here; remove the row")
    options = row.get(OPTIONS)
    if options is not None and not isinstance(options, dict):
        raise Fault(f"{OPTIONS!r} is {kind_of(options)}, not an object; fix or remove it")
    functions = [{"type": "function", "function": function} for function in _listed(row, "functions")]
    return Conversation(turns, (*_listed(row, "tools"), *functions), options or {})


def _listed(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of objects, which may be given as JSON text, as in tables."""
    value = _parsed(row.get(name) or [], repr(name))
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Fault(f"{name!r} is {kind_of(value)}, not a list of objects; fix or remove it")
    return value


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Fault(f"{what} is text that is not JSON ({error}); fix or remove it") from None


def read_system(row: Mapping[str, Any]) -> Turns:
    """Return what the system says before the first turn."""
    system = row.get("system")
    return (Message("system", _text(system, "'system'"), False),) if system else ()


def read_side(value: Any, name: str, role: str) -> Turns:
    """Return the turns of a prompt, which is not learned, or of a completion: a text, or a list of
    messages."""
    if isinstance(value, list):
        turns = _messages(value, name, ("role", "content"))
        return turns if role == "assistant" else asked(turns)
    return (Message(role, _text(value, repr(name)), role == "assistant"),)


def asked(turns: Iterable[Message]) -> Turns:
    """Return the turns with none of them to be learned."""
    return tuple(replace(turn, counts=False) for turn in turns)


def _messages(value: Any, name: str, keys: tuple[str, str]) -> Turns:
    if not isinstance(value, list):
        raise Fault(f"{name!r} is {kind_of(value)}, not a list of turns {_turn(keys)}; fix the row")
    return tuple(_message(turn, f"{name}[{number}]", keys) for number, turn in enumerate(value))


def _message(turn: Any, place: str, keys: tuple[str, str]) -> Message:
    role_key, content_key = keys
    calls = isinstance(turn, dict) and any(turn.get(name) for name in ("tool_calls", "function_call", *REASONING))
    if not isinstance(turn, dict) or not turn.keys() >= ({role_key} if calls else set(keys)):
        has = f"has {', '.join(map(repr, turn)) or 'no field'}" if isinstance(turn, dict) else f"is {kind_of(turn)}"
        raise Fault(f"{place} {has}; a turn is {_turn(keys)}; fix the row")
    spelling = turn[role_key]
    role = ROLES.get(spelling) if isinstance(spelling, str) else None
    if role is None:
        legal = ", ".join(ROLES)
        raise Fault(f"{place}: {role_key} is {str(spelling)[:40]!r}; legal: {legal}; fix the row")
    told = {name: value for name, value in turn.items() if name not in (role_key, content_key) and value is not None}
    counts = _counts(told, role, place)
    more = {name: _checked(value, f"{place}: {name}") for name, value in told.items() if name not in LEARNING}
    if role == "assistant" and (called := _calls(turn, spelling, content_key, place)):
        more = {**{name: value for name, value in more.items() if name != "function_call"}, "tool_calls": called}
    content = None if spelling in CALLING_ROLES else turn.get(content_key)
    if content is None and calls | (spelling in CALLING_ROLES):
        return Message(role, "", counts, keys={**more, "content": None})
    parts = _parts(content, f"{place}: {content_key}")
    return Message(role, "".join(parts), counts, parts if isinstance(content, list) else (), more)


LEARNING = frozenset({*WEIGHTS, *FLAGS, MASK})


def _counts(told: Mapping[str, Any], role: str, place: str) -> bool:
    """Return whether a turn is learned: an assistant's is, unless one of its keys says
    otherwise."""
    said: dict[str, bool] = {}
    for name in (*WEIGHTS, *FLAGS, MASK):
        if name in told:
            if told[name] not in (0, 1):  # true and false equal 1 and 0
                raise Fault(
                    f"{place}: {name} is {str(told[name])[:40]!r}; legal: 1 (learned) and 0 (not)"
                    f"{', or the other way round: it masks' if name == MASK else ''}; fix the row"
                )
            said[name] = bool(told[name]) != (name == MASK)
    if not all(said.values()):
        return False
    return role == "assistant" or any(name in said for name in FLAGS_OF_ANY_ROLE)


def _calls(turn: Mapping[str, Any], role: str, content_key: str, place: str) -> list[Any]:
    """Return an assistant's calls of tools as chat templates take them, however they were
    written."""
    if role in CALLING_ROLES:
        called = _parsed(turn.get(content_key), f"{place}: {content_key}")
        return [_call(call, f"{place}: {content_key}") for call in (called if isinstance(called, list) else [called])]
    if turn.get("function_call"):
        return [_call(_parsed(turn["function_call"], f"{place}: function_call"), f"{place}: function_call")]
    called = _parsed(turn.get("tool_calls") or [], f"{place}: tool_calls")
    if not isinstance(called, list) or not all(isinstance(call, dict) for call in called):
        raise Fault(f"{place}: tool_calls is {kind_of(called)}, not a list of objects; fix the row")
    return called


def _call(call: Any, what: str) -> dict[str, Any]:
    if not isinstance(call, dict) or "name" not in call:
        raise Fault(f'{what} is not a call {{"name": "…", "arguments": {{…}}}}; fix the row')
    return {"type": "function", "function": call}


def _parts(content: Any, what: str) -> tuple[str, ...]:
    """Return the texts of a content: one text, or parts [{"type": "text", "text": "…"}]."""
    if not isinstance(content, list):
        return (_text(content, what),)
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise Fault(
                f"{what}[{number}] is of type {str(part['type'])[:40]!r}, and texts alone are trained here; remove the row"
            )
        texts.append(_text(part.get("text") if isinstance(part, dict) else part, f"{what}[{number}]"))
    return tuple(texts)


def _turn(keys: tuple[str, str]) -> str:
    return f'{{"{keys[0]}": "…", "{keys[1]}": "…"}}'


def _checked(value: Any, what: str) -> Any:
    """Return a value for the template, after checking each text in it as `_text` does."""
    if isinstance(value, str):
        return _text(value, what)
    if isinstance(value, dict):
        return {name: _checked(entry, f"{what}.{name}") for name, entry in value.items()}
    return [_checked(entry, what) for entry in value] if isinstance(value, list) else value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Fault(f"{what} is {kind_of(value)}, not text; fix or remove the row")
    for letter in value if not value.isascii() else "":
        if ord(letter) in NONCHARACTERS:
            raise Fault(f"{what} holds U+{ord(letter):04X}, which Unicode keeps for programs' own marks; remove it")
    return require_characters(value, what)
