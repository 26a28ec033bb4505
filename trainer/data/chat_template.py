"""A tokenizer's chat template: conversations → text, and where in it the assistant speaks.

Templates come with downloaded folders, so they are rendered in jinja2's immutable sandbox, as transformers renders them: no
attribute that leads into Python, no change of what they are given, and nothing that could grow without bound by one
multiplication.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from trainer.data.conversations import Conversation, Message
from trainer.data.fault import Fault, first_line
from trainer.errors import RecipeError

# For tokenizers without one. A turn is its role, a newline, its content and the end-of-document token, which no text yields:
# tokens divide into turns at that token, and a turn at its first newline, so there is one way only to read them.
DEFAULT_TEMPLATE = (
    "{%- if bos_token and bos_token != eos_token -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message['role'] + '\\n' + message['content'] + eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}"
)
TODAY = datetime.datetime(2024, 7, 26)  # what templates get for now: the same data must give the same tokens on any day
LARGEST_REPETITION = 10_000
# Marks in rendered text, removed from it again; no content may hold them (NONCHARACTERS).
ANSWER, ANSWER_END = "\ufdd0", "\ufdd1"

Span = tuple[int, int]


class ChatTemplate:
    """One template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """RecipeError when it is no template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"data.tokenizer: its chat template is not valid: line {error.lineno}: {first_line(error)}; correct it"
            ) from None
        self._special_tokens = dict(special_tokens)
        self._marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text. RecipeError for a template that reaches for what it must not have, Fault for a conversation that it
        refuses."""
        return re.sub(f"[{ANSWER}{ANSWER_END}]", "", self._render(messages, add_generation_prompt))

    def answers(self, messages: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the turns stand that count, end of turn included."""
        marked = self._render(messages)
        if self._marks_answers:
            text, spans = _cut_at_marks(marked)
            return text, _those_that_count(messages, spans)
        spans = []
        position = 0
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                begin, end = self._answer(messages, turn, marked, position)
                position = end
                if message.counts and message.content.strip():
                    spans.append((begin, end))
        return marked, spans

    def _answer(self, messages: Conversation, turn: int, text: str, after: int) -> Span:
        """Where one turn of the assistant stands: from where generation would begin, to where the turn ends.

        Found by rendering less of the conversation; where a template writes that otherwise (many drop the reasoning of
        earlier turns), by the content itself.
        """
        content = messages[turn].content.strip()
        prompt = self._part(messages[:turn], add_generation_prompt=True) or ""
        if len(prompt) > after and text.startswith(prompt):
            begin = len(prompt)
        else:
            same = _length_in_common(prompt, text)  # as far as what comes before the content is written alike
            begin = _find(content, text, same if text.find(content, same) >= after else after, turn)
        whole = self._part(messages[: turn + 1])
        if whole is None:
            raise Fault(f"the chat template does not render the conversation up to turn {turn + 1}; {REMEDY}")
        if text.startswith(whole):
            return begin, len(whole)
        tail = whole[whole.rfind(content) + len(content) :]
        end = _find(content + tail, text, begin, turn) + len(content) + len(tail)
        return begin, end

    def _part(self, messages: Conversation, *, add_generation_prompt: bool = False) -> str | None:
        try:
            return self._render(messages, add_generation_prompt)
        except Fault:  # many templates refuse conversations that end or begin with the assistant
            return None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        given = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=given, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._special_tokens
            )
        except SecurityError as error:
            raise RecipeError(
                f"data.tokenizer: its chat template is not safe: {first_line(error)}; do not use this tokenizer"
            ) from None
        except Exception as error:  # a template can fail in as many ways as a program
            raise Fault(f"the chat template refuses this conversation: {first_line(error)}; mend or remove it") from None


REMEDY = "mark the answers in the template with {% generation %} … {% endgeneration %}"


def _length_in_common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _find(piece: str, text: str, begin: int, turn: int) -> int:
    found = text.find(piece, begin)
    if found < 0:
        raise Fault(f"the chat template does not show turn {turn + 1} as it is written, so its tokens cannot be told; {REMEDY}")
    return found


def _cut_at_marks(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for piece in marked.split(ANSWER):
        answer, mark, rest = piece.partition(ANSWER_END)
        if mark:
            spans.append((len(text), len(text) + len(answer)))
        text += answer + rest
    return text, spans


def _those_that_count(messages: Conversation, spans: list[Span]) -> list[Span]:
    answers = [message for message in messages if message.role == "assistant"]
    if len(answers) == len(spans):
        return [span for span, turn in zip(spans, answers, strict=True) if turn.counts and turn.content.strip()]
    if any(not answer.counts for answer in answers):
        raise Fault(f"the chat template marks {len(spans)} answers of {len(answers)}: which of them count cannot be told")
    return [(begin, end) for begin, end in spans if begin < end]


class _GenerationMarks(Extension):
    """{% generation %} … {% endgeneration %}: what stands between them is what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{ANSWER}{caller()}{ANSWER_END}"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which refuses at once, and without the two operators by which a short template fills a memory or a day."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """jinja2 would write nothing in its place, and go on."""
        raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__!r}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it uses **")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(other, int) and other > LARGEST_REPETITION:
                raise SecurityError(f"it repeats something {other} times")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """jinja2's, without names that lead into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r} in a namespace")
        super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
    """As transformers sets it up, so that a template gives the same text; but the date is a fixed one."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": environment.globals["range"],
        "dict": lambda *given, **named: dict(*given, **named),
        "namespace": _Namespace,
        "raise_exception": _refuse,
        "strftime_now": TODAY.strftime,
    }
    return environment


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
