"""The places of the answers in a rendered conversation: from where generation would begin to what
ends the turn.

Answers are not searched for by their content, because the same text may stand in the question too.
The template's own loop tells what each message wrote (`ChatTemplate.trace`). The front of it that
the generation prompt also has is not learned. Where the content ends is found by rendering the
conversation again with another answer in its place: what stays the same is what ends the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trainer.data.chat_template import ChatTemplate, Request, Trace
from trainer.data.conversations import Conversation, Message, Turns
from trainer.data.fault import Fault

QUESTION = Message("user", "x", False)
SOMETHING = "\ufdd6"  # a placeholder that no content contains
REMEDY = "take another template, or mark the answers in it with {% generation %} … {% endgeneration %}"


@dataclass(frozen=True)
class Answer:
    """A turn that is learned, [begin, end) of a text. Its content ends at `said`; what follows, up
    to `end`, ends the turn."""

    begin: int
    said: int
    end: int


@dataclass(frozen=True)
class Written:
    """A conversation as its template writes it.

    `cut`: numbers, from 0, of turns to be learned of which the template omits something. `mute`:
    numbers of other turns of which it writes nothing.
    """

    text: str
    answers: list[Answer]
    cut: tuple[int, ...] = ()
    mute: tuple[int, ...] = ()


class Writer:
    """A renderer of conversations by one template that also finds their answers.

    `tokens`: the text forms of the tokenizer's added tokens. `guard`: a function applied to each
    text from a row.
    """

    def __init__(self, template: ChatTemplate, tokens: Sequence[str], guard: Callable[[str], str]) -> None:
        self.template = template
        self._guard = guard
        spelt = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        self._pieces = re.compile(f"({spelt})|\n" if spelt else "\n")

    def prompt(self, turns: Turns) -> str:
        """Return the text after which the assistant speaks. Raises Fault as `write` does."""
        return self.template.render(self.request(Conversation(turns)), add_generation_prompt=True)

    def write(self, conversation: Conversation) -> Written:
        """Return the conversation as written. Fault if the template refuses it or writes nothing of
        its answers."""
        fault: Fault | None = None
        for variant in _variants(conversation):
            try:
                return self._write(variant)
            except _Escaped as escaped:
                fault = fault or Fault(str(escaped))
            except Fault as refused:
                fault = fault or refused
        assert fault is not None
        raise fault

    def _write(self, conversation: Conversation) -> Written:
        text, trace, turns = self.template.render(self.request(conversation)), self.trace(conversation), conversation.turns
        if trace.text != text:  # the trace does not tell which message wrote which part
            trace = Trace(text, {}, [], len(text))
        learned = [number for number, turn in enumerate(turns) if turn.counts and turn.says_something]
        reading = _Reading(self, conversation, trace, learned)
        answers = [reading.answer(number) for number in learned]
        for number in learned:
            _require_calls(turns[number], trace.turn(number), number)
        cut = tuple(n for n in learned if not self._is_whole(turns[n], trace.turn(n)))
        others = (n for n, turn in enumerate(turns) if n not in learned and turn.content.strip())
        mute = tuple(n for n in others if self._guard(turns[n].content).strip() not in text and not trace.turn(n))
        return Written(text, answers, cut, mute)

    def _is_whole(self, turn: Message, written: str) -> bool:
        """Return whether each part of a turn's content, and its thought, appears in what was
        written.

        A template may split a content at the marks it looks for.
        """
        marks = "|".join(map(re.escape, sorted(self.template.looked_for, key=len, reverse=True)))
        parts = re.split(marks, turn.content) if marks else [turn.content]
        return all(self._guard(part).strip() in written for part in (*parts, turn.thought))

    def pieces(self, text: str) -> Iterator[str]:
        """Yield the text in pieces: the added tokens, and the lines between them with their line
        ends."""
        at = 0
        for found in self._pieces.finditer(text):
            begin = found.start() if found[1] else found.end()
            for end in (begin, found.end()):
                if at < end:
                    yield text[at:end]
                at = end
        if at < len(text):
            yield text[at:]

    def is_token(self, piece: str) -> bool:
        """Return whether a piece is an added token."""
        found = self._pieces.fullmatch(piece)
        return found is not None and found[1] is not None

    def trace(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Trace:
        return self.template.trace(self.request(conversation), add_generation_prompt=add_generation_prompt)

    def request(self, conversation: Conversation) -> Request:
        tools = [_guarded(tool, self._guard) for tool in conversation.tools]
        return Request([self._given(turn) for turn in conversation.turns], tools, conversation.options)

    def _given(self, turn: Message) -> dict[str, Any]:
        """Return a message as transformers hands it to the template: without empty keys, the
        thought under both its names."""
        content: Any = self._guard(turn.content)
        if self._wants_parts if not turn.parts else self._takes_parts:
            content = [{"type": "text", "text": self._guard(text)} for text in turn.parts or (turn.content,)]
        given = {"role": turn.role, "content": content, **_guarded(turn.keys, self._guard)}
        if turn.thought:
            thought = self._guard(turn.thought)
            given = {"thinking": thought, **given, "reasoning_content": thought}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def _wants_parts(self) -> bool:
        """Return whether the template writes contents only where they are given in parts."""
        return not self._shows(SOMETHING) and self._takes_parts

    @cached_property
    def _takes_parts(self) -> bool:
        return self._shows([{"type": "text", "text": SOMETHING}])

    def _shows(self, content: Any) -> bool:
        """Return whether the template writes a content of this form in both roles, and not as
        Python would print it."""
        exchange = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = self.template.render(Request(exchange))
        except Fault:
            return False
        return text.count(SOMETHING) >= 2 and not re.search(r"""['"]text['"]""", text)


@dataclass
class _Reading:
    """A conversation with what its template wrote, and the numbers of the turns to be learned."""

    writer: Writer
    conversation: Conversation
    whole: Trace
    learned: Sequence[int]
    # Generation prompts by the role that speaks before, and by QUESTION's content.
    prompts: dict[str, str] = field(default_factory=dict)

    def answer(self, number: int) -> Answer:
        """Return the place of a turn's answer. Fault if it cannot be determined."""
        if number not in self.whole.turns:
            raise Fault(f"the chat template writes nothing of turn {number + 1}, or not in one piece; {REMEDY}")
        begin, end = self.whole.turns[number]
        if self._is_last(number):  # what a template writes behind the last turn also ends it
            end = len(self.whole.text)
        elif self._is_calling(number):
            end = begin + self._own(number, self.whole.text[begin:end])
        written, ending = self.whole.text[begin:end], self._ending(number)
        said = end - len(ending) if ending is not None and written.endswith(ending) else None
        marked = [span for span in self.whole.marked if begin <= span[0] < end]
        if marked:
            begin, end = marked[0][0], marked[-1][1]
        elif self.conversation.turns[number].role == "assistant":
            begin += len(self._opening(number, written))
        else:
            begin += self._first_word(number, written)
        if said is None:
            said, end = (begin + size for size in self._closed(self.whole.text[begin:end]))
        return Answer(begin, min(max(begin, said), end), end)

    def _is_last(self, number: int) -> bool:
        return number == len(self.conversation.turns) - 1

    def _is_calling(self, number: int) -> bool:
        return not self._is_last(number) and self.conversation.turns[number + 1].role == "tool"

    def _own(self, number: int, written: str) -> int:
        """Return how many characters of what a turn wrote are its own: some templates write the
        answers of tools into the turn that calls them."""
        try:
            alone = self._trace(self.conversation.turns[: number + 1]).turn(number)
        except Fault:
            return len(written)
        return len(alone) if written.startswith(alone) else len(written)

    # -------------------------------------------------------------------------------- where it ends

    def _ending(self, number: int) -> str | None:
        """Return what follows the content of a turn whatever it says, or None if the turn cannot
        say anything else.

        Fault if the template writes no content.
        """
        written = self._spoken(self._all_replaced, number)
        if SOMETHING not in written:
            written = self._spoken(self._replaced(number), number)
        if SOMETHING in written:
            return written[written.rindex(SOMETHING) + len(SOMETHING) :]
        if written and self.conversation.turns[number].content.strip():
            raise Fault(f"the chat template does not write what turn {number + 1} says; {REMEDY}")
        return None

    def _spoken(self, trace: Trace | None, number: int) -> str:
        if trace is None or number not in trace.turns:
            return ""
        begin, end = trace.turns[number]
        return trace.text[begin : len(trace.text) if self._is_last(number) else end]

    @cached_property
    def _all_replaced(self) -> Trace | None:
        """The trace with every answer replaced at once, except those that call tools, whose results
        would follow."""
        turns = list(self.conversation.turns)
        for number in self.learned:
            if not self._is_calling(number):
                turns[number] = Message(turns[number].role, SOMETHING, True)
        return self._traced(tuple(turns))

    def _replaced(self, number: int) -> Trace | None:
        """Return the trace with the content of one turn replaced."""
        turns = self.conversation.turns
        following = () if self._is_calling(number) else turns[number + 1 :]
        return self._traced((*turns[:number], Message(turns[number].role, SOMETHING, True), *following))

    def _closed(self, written: str) -> tuple[int, int]:
        """Return (characters before the closing tokens, characters including the first of them).

        For a turn that does not end as others do, such as one that calls a tool. The first token at
        its end closes the turn; what follows opens something else, such as the tool's answer.
        """
        pieces = list(self.writer.pieces(written))
        size = len(pieces)
        while size and (self.writer.is_token(pieces[size - 1]) or not pieces[size - 1].strip()):
            size -= 1
        closing = next((at for at in range(size, len(pieces)) if pieces[at].strip()), len(pieces) - 1)
        return len("".join(pieces[:size])), len("".join(pieces[: closing + 1]))

    # ------------------------------------------------------------------------------ where it begins

    def _opening(self, number: int, written: str) -> str:
        """Return the front of a turn that is not the assistant's own: the part of the generation
        prompt with which the turn begins, in whole tokens and lines.

        A thought that some prompts begin (<think>) is nevertheless the assistant's, because other
        prompts do not begin it.
        """
        for prompt in self._generation_prompts(number, written):
            opening = ""
            for piece in self.writer.pieces(prompt):
                if self.writer.template.has_in_contents(piece.strip()) or not written.startswith(opening + piece):
                    break
                opening += piece
            if opening:
                return opening
        return ""

    def _generation_prompts(self, number: int, written: str) -> Iterator[str]:
        """Yield what the template writes to make the assistant speak in the place of a turn, and
        then what it writes after a question.

        The second is needed because some templates write nothing behind the answers of tools.
        """
        turns = self.conversation.turns
        before = turns[number - 1].role if number else ""
        if before not in self.prompts or not written.startswith(self.prompts[before]):
            self.prompts[before] = self._prompt_after(turns[:number]) or self._prompt_after(turns)
        yield self.prompts[before]
        if QUESTION.content not in self.prompts:
            self.prompts[QUESTION.content] = self._prompt_after((QUESTION,))
        yield self.prompts[QUESTION.content]

    def _prompt_after(self, turns: Turns) -> str:
        """Return what follows the last of the turns when the assistant is to speak, behind the
        template's loop or at the end of it."""
        trace = self._traced(turns, add_generation_prompt=True) if turns else None
        if trace is None:
            return ""
        if len(turns) - 1 in trace.turns and trace.end < len(trace.text):
            return trace.text[trace.end :]
        without = self._traced(turns)
        return trace.text[len(without.text) :] if without is not None and trace.text.startswith(without.text) else ""

    def _first_word(self, number: int, written: str) -> int:
        """Return the place where the content of another role's turn begins in what it wrote."""
        turns = list(self.conversation.turns)
        turns[number] = replace(turns[number], content=SOMETHING, parts=())
        front, found, _ = self._trace(tuple(turns)).turn(number).partition(SOMETHING)
        if not found or not written.startswith(front):
            raise Fault(f"the chat template does not write what turn {number + 1} says; {REMEDY}")
        return len(front)

    def _trace(self, turns: Turns) -> Trace:
        return self.writer.trace(replace(self.conversation, turns=turns))

    def _traced(self, turns: Turns, *, add_generation_prompt: bool = False) -> Trace | None:
        """Return the trace, or None if the template refuses the turns: others may depend on what
        the replaced ones really say."""
        try:
            return self.writer.trace(replace(self.conversation, turns=turns), add_generation_prompt=add_generation_prompt)
        except Fault:
            return None


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """Return a JSON value with the guard applied to each text in it."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {name: _guarded(entry, guard) for name, entry in value.items()}
    return [_guarded(entry, guard) for entry in value] if isinstance(value, list | tuple) else value


class _Escaped(Fault):
    """Arguments of a call were written as a text within a text."""


def _require_calls(turn: Message, written: str, number: int) -> None:
    """Raise Fault unless the turn's calls were written; arguments given as text must not be quoted
    once more."""
    for call in turn.calls:
        called = call.get("function", call)
        name, arguments = called.get("name"), called.get("arguments")
        if isinstance(name, str) and name not in written:
            raise Fault(f"the chat template does not write the tool call of turn {number + 1}; take another template")
        if isinstance(arguments, str) and '"' in arguments and json.dumps(arguments, ensure_ascii=False) in written:
            raise _Escaped(f"the chat template writes the arguments of the tool call of turn {number + 1} as a quoted text")


def _variants(conversation: Conversation) -> Iterator[Conversation]:
    """Yield the conversation as it is, then with the arguments of its calls as objects, then as
    texts.

    Data has both forms, and templates accept one or the other. Each form also comes with "" for a
    content that is missing beside calls.
    """
    calls = any(turn.calls for turn in conversation.turns)
    for change in (lambda given: given, _as_object, _as_text) if calls else (lambda given: given,):
        turns = [replace(turn, keys=_changed(turn.keys, change)) if turn.calls else turn for turn in conversation.turns]
        yield replace(conversation, turns=tuple(turns))
        if any("content" in turn.keys for turn in turns):
            filled = [replace(turn, keys={**turn.keys, "content": turn.content}) for turn in turns]
            yield replace(conversation, turns=tuple(filled))


def _changed(keys: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = []
    for call in keys["tool_calls"]:
        inner = call.get("function", call)
        inner = {**inner, "arguments": change(inner.get("arguments"))}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**keys, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
