"""A tokenizer's chat template: conversations → text, and which part of the text each message wrote.

Templates come with downloaded folders, so they are rendered in jinja2's immutable sandbox, as transformers renders them: no
attribute that leads into Python, no change of what they are given, and nothing that could grow without bound by one
multiplication.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

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
# Marks in traced text, removed from it again; no content may hold them (NONCHARACTERS). ANSWER … ANSWER_END enclose what
# {% generation %} does; VISIT "loop:message" VISIT_END stands where a loop begins with a message, VISIT "loop" VISIT_END where
# it is done with it.
ANSWER, ANSWER_END = "\ufdd0", "\ufdd1"
VISIT, VISIT_END = "\ufdd4", "\ufdd5"
MARK = re.compile(f"{ANSWER}|{ANSWER_END}|{VISIT}([^{VISIT_END}]*){VISIT_END}")
# What templates look for in a content with, beside `in`.
STRING_METHODS = frozenset(
    {"split", "rsplit", "startswith", "endswith", "partition", "rpartition", "find", "rfind", "index", "replace"}
    | {"removeprefix", "removesuffix", "count"}
)
BRACKETED = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)  # as <think>, [TOOL_CALLS], <|channel|>: no plain word, no white space

Span = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """What a template is given, as transformers gives it: messages, tools, and what else rows may set for it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A rendered text; spans are of its characters.

    `turns`: where each message stands that the template wrote in one piece, by its number. `marked`: what {% generation %}
    enclosed. `end`: behind the last message, where only what belongs to none of them follows.
    """

    text: str
    turns: dict[int, Span]
    marked: list[Span]
    end: int

    def turn(self, number: int) -> str:
        """Return what one message wrote; "" for a message that wrote nothing, or not in one piece."""
        begin, end = self.turns.get(number, (0, 0))
        return self.text[begin:end]


class ChatTemplate:
    """One template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """RecipeError when it is no template."""
        environment = _environment()
        try:
            self._syntax_tree = environment.parse(source)
            self._template = environment.from_string(source)
            self._traced = environment.from_string(_Tracing().visit(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"data.tokenizer: its chat template is not valid: line {error.lineno}: {first_line(error)}; correct it"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(self, request: Request, *, add_generation_prompt: bool = False) -> str:
        """The text. RecipeError for a template that reaches for what it must not have, Fault for a conversation that it
        refuses."""
        text = self._run(self._template, request, add_generation_prompt=add_generation_prompt)
        return re.sub(f"[{ANSWER}{ANSWER_END}]", "", text)

    def trace(self, request: Request, *, add_generation_prompt: bool = False) -> Trace:
        """Who wrote what of the text. Errors as for `render`, whose text it is unless the template measures or cuts its own
        output, marks and all."""
        more = {"add_generation_prompt": add_generation_prompt, TRACER: _Tracer(request.messages)}
        return _read_marks(self._run(self._traced, request, **more))

    @cached_property
    def mentioned(self) -> frozenset[str]:
        """The words that the template's code names: keys that it may read are among them."""
        constants = {node.value for node in self._syntax_tree.find_all(nodes.Const) if isinstance(node.value, str)}
        attributes = {node.attr for node in self._syntax_tree.find_all(nodes.Getattr)}
        return frozenset(constants | attributes | {node.name for node in self._syntax_tree.find_all(nodes.Name)})

    @cached_property
    def looked_for(self) -> frozenset[str]:
        """What the template looks for in contents, such as </think>: there it is part of how contents are written."""
        found = set()
        for compared in self._syntax_tree.find_all(nodes.Compare):
            if any(operand.op in ("in", "notin") for operand in compared.ops):
                found |= set(_strings(compared.expr))
        for call in self._syntax_tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Getattr) and call.node.attr in STRING_METHODS:
                found |= {text for argument in call.args for text in _strings(argument)}
        return frozenset(text for text in found if BRACKETED.fullmatch(text))

    def has_in_contents(self, spelling: str) -> bool:
        """Whether contents are written with it: the template looks for it there, or writes what closes it, as </think> does
        <think>."""
        closing = f"</{spelling[1:]}" if re.fullmatch(r"<\w+>", spelling) else spelling
        return any(spelling in text or closing in text for text in self.looked_for) or (
            closing != spelling and any(closing in text for text in self.mentioned)
        )

    def _run(self, template: jinja2.Template, request: Request, **more: Any) -> str:
        given = {"documents": None, **self._special_tokens, **request.options, **more}
        try:
            return template.render(messages=request.messages, tools=request.tools or None, **given)
        except SecurityError as error:
            raise RecipeError(
                f"data.tokenizer: its chat template is not safe: {first_line(error)}; do not use this tokenizer"
            ) from None
        except Exception as error:  # a template can fail in as many ways as a program
            raise Fault(f"the chat template refuses this conversation: {first_line(error)}; mend or remove it") from None


def _strings(expression: nodes.Node) -> Iterator[str]:
    if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
        yield expression.value


# ------------------------------------------------------------------------------------------------ who wrote what

TRACER = "triaxis_tracer"


class _Tracer:
    """What a traced template calls to have marks in its output. Loops over anything but messages leave none: templates measure
    and trim what such loops write."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._messages = messages
        self._over_messages: set[int] = set()  # loops
        self._by_number: set[int] = set()
        self._has_taken: set[int] = set()  # loops over numbers, in this turn of theirs

    def begin(self, loop: int, value: Any) -> str:
        """A loop takes its next value."""
        self._has_taken.discard(loop)
        number = self._number(value)
        if number is None:
            return ""
        self._over_messages.add(loop)
        return f"{VISIT}{loop}:{number}{VISIT_END}"

    def take(self, loop: int, value: Any) -> str:
        """Inside a loop a name gets a value: of a loop over numbers, the first message is what it is about."""
        number = self._number(value)
        if number is None or loop in self._over_messages | self._has_taken:
            return ""
        self._by_number.add(loop)
        self._has_taken.add(loop)
        return f"{VISIT}{loop}:{number}{VISIT_END}"

    def end(self, loop: int) -> str:
        return f"{VISIT}{loop}{VISIT_END}" if loop in self._over_messages | self._by_number else ""

    def _number(self, value: Any) -> int | None:
        return next((number for number, message in enumerate(self._messages) if message is value), None)


class _Tracing(NodeTransformer):
    """Has each loop of a template say with which value it begins, and when it is done with it: which of them are loops over
    messages is seen by the values."""

    def __init__(self) -> None:
        self._loops = 0
        self._inside: list[nodes.Const] = []

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node | list[nodes.Node]:
        self._loops += 1
        loop = nodes.Const(self._loops)
        self._inside.append(loop)
        self.generic_visit(node, *args, **kwargs)
        self._inside.pop()
        if isinstance(node.target, nodes.Name):
            node.body.insert(0, _said("begin", loop, nodes.Name(node.target.name, "load")))
        node.body.append(_said("end", loop))
        return [node, _said("end", loop)]  # a body that was left by continue or break did not come to its end

    def visit_Assign(self, node: nodes.Assign, *args: Any, **kwargs: Any) -> nodes.Node | list[nodes.Node]:
        if not self._inside or not isinstance(node.target, nodes.Name):
            return node
        return [node, _said("take", self._inside[-1], nodes.Name(node.target.name, "load"))]


def _said(method: str, *arguments: nodes.Expr) -> nodes.Output:
    call = nodes.Call(nodes.Getattr(nodes.Name(TRACER, "load"), method, "load"), list(arguments), [], None, None)
    return nodes.Output([call])


def _read_marks(marked: str) -> Trace:
    """Take the marks out of a traced text, and read them."""
    text, at = "", 0
    answers: list[Span] = []
    answer_begin = 0
    open_visits: list[tuple[str, int, int]] = []  # loop, message, where it begins in the text
    visits: list[tuple[int, Span]] = []

    def close(loop: str) -> None:
        """The visit of that loop is over, with those inside it."""
        while any(one == loop for one, _, _ in open_visits):
            _, message, begin = open_visits.pop()
            if not open_visits and text[begin:].strip():
                visits.append((message, (begin, len(text))))

    for mark in MARK.finditer(marked):
        text += marked[at : mark.start()]
        at = mark.end()
        if mark[0] == ANSWER:
            answer_begin = len(text)
        elif mark[0] == ANSWER_END:
            answers.append((answer_begin, len(text)))
        else:
            loop, _, message = mark[1].partition(":")
            close(loop)
            if message:
                open_visits.append((loop, int(message), len(text)))
    text += marked[at:]
    end = max((span[1] for _, span in visits), default=0)
    times: dict[int, list[Span]] = {}
    for message, span in visits:
        times.setdefault(message, []).append(span)
    turns = {message: spans[0] for message, spans in times.items() if len(spans) == 1}
    return Trace(text, turns, answers, end)


# ------------------------------------------------------------------------------------------------ the sandbox


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
