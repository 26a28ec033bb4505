"""A tokenizer's chat template: it renders conversations, and tells which part of the text each
message wrote.

Templates come with downloaded folders, so they are rendered in jinja2's immutable sandbox, as in
transformers: no access to attributes that lead into Python, no change to their input. Their work is
also counted (`template_sandbox.py`), so that none runs for a day or fills the memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from trainer.data.fault import Fault, first_line
from trainer.data.template_counting import Counting
from trainer.data.template_sandbox import Called, Sandbox
from trainer.errors import RecipeError

# The template of tokenizers without one. A turn is its role, a newline, its content and the
# end-of-document token, which no text yields. Tokens therefore divide into turns at that token, and
# a turn at its first newline, in one way only.
DEFAULT_TEMPLATE = (
    "{%- if bos_token and bos_token != eos_token -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message['role'] + '\\n' + message['content'] + eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}"
)
LARGEST_TEMPLATE = 1 << 18  # characters: ten times the longest published templates
# Errors that jinja2 and Python raise for a source they cannot read: nested too deeply, numbers with
# too many digits, more nested loops than Python allows.
UNREADABLE = (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, OverflowError, MemoryError)
# Marks in traced text, removed again afterwards; no content may hold them (NONCHARACTERS). ANSWER …
# ANSWER_END enclose what {% generation %} encloses. VISIT "loop:message" VISIT_END stands where a
# loop begins with a message, VISIT "loop" VISIT_END where it is done with it.
ANSWER, ANSWER_END = "\ufdd0", "\ufdd1"
VISIT, VISIT_END = "\ufdd4", "\ufdd5"
MARK = re.compile(f"{ANSWER}|{ANSWER_END}|{VISIT}(\\d{{1,12}})(?::(\\d{{1,12}}))?{VISIT_END}")
# The methods with which templates search a content, besides `in`.
STRING_METHODS = frozenset(
    {"split", "rsplit", "startswith", "endswith", "partition", "rpartition", "find", "rfind", "index", "replace"}
    | {"removeprefix", "removesuffix", "count"}
)
BRACKETED = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)  # such as <think>, [TOOL_CALLS], <|channel|>

Span = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """The input of a template, in the form transformers uses: messages, tools, and options that a
    row sets for it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A rendered text with the parts that its messages wrote; spans are of its characters.

    `turns`: by number, the span of each message that the template wrote in one piece. `marked`:
    what {% generation %} enclosed. `end`: the end of the last message; what follows belongs to none
    of them.
    """

    text: str
    turns: dict[int, Span]
    marked: list[Span]
    end: int

    def turn(self, number: int) -> str:
        """Return what one message wrote; "" for a message that wrote nothing, or not in one
        piece."""
        begin, end = self.turns.get(number, (0, 0))
        return self.text[begin:end]


class ChatTemplate:
    """A template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Parse the template. RecipeError if it is not valid."""
        if len(source) > LARGEST_TEMPLATE:
            raise RecipeError(
                f"data.tokenizer: its chat template has {len(source):,} characters, and at most {LARGEST_TEMPLATE:,} are read; "
                "give another tokenizer"
            )
        environment = Sandbox(_GenerationMarks)
        self._budget = environment.budget
        try:
            self._syntax_tree = environment.parse(source)
            self._template = environment.from_string(Counting().visit(environment.parse(source)))
            self._traced = environment.from_string(_Tracing().visit(Counting().visit(environment.parse(source))))
        except SecurityError as error:
            raise _unsafe(error) from None
        except UNREADABLE as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise RecipeError(
                f"data.tokenizer: its chat template is not valid: {line}{first_line(error)}; correct it"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(self, request: Request, *, add_generation_prompt: bool = False) -> str:
        """Return the text.

        RecipeError if the template reaches for what it must not have, Fault if it refuses the
        conversation.
        """
        text = self._run(self._template, request, add_generation_prompt=add_generation_prompt)
        return re.sub(f"[{ANSWER}{ANSWER_END}]", "", text)

    def trace(self, request: Request, *, add_generation_prompt: bool = False) -> Trace:
        """Return the text with the parts that its messages wrote. Raises what `render` raises.

        The text is that of `render`, unless the template measures or cuts its own output, marks
        included.
        """
        more = {"add_generation_prompt": add_generation_prompt, TRACER: _Tracer(request.messages)}
        return _read_marks(self._run(self._traced, request, **more))

    @cached_property
    def mentioned(self) -> frozenset[str]:
        """The words that the template's code names; the keys that it may read are among them."""
        constants = {node.value for node in self._syntax_tree.find_all(nodes.Const) if isinstance(node.value, str)}
        attributes = {node.attr for node in self._syntax_tree.find_all(nodes.Getattr)}
        return frozenset(constants | attributes | {node.name for node in self._syntax_tree.find_all(nodes.Name)})

    @cached_property
    def looked_for(self) -> frozenset[str]:
        """The texts that the template looks for in contents, such as </think>, and that are
        therefore part of how contents are written."""
        found = set()
        for compared in self._syntax_tree.find_all(nodes.Compare):
            if any(operand.op in ("in", "notin") for operand in compared.ops):
                found |= set(_strings(compared.expr))
        for call in self._syntax_tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Getattr) and call.node.attr in STRING_METHODS:
                found |= {text for argument in call.args for text in _strings(argument)}
        return frozenset(text for text in found if BRACKETED.fullmatch(text))

    def has_in_contents(self, spelling: str) -> bool:
        """Return whether contents are written with this text: the template looks for it there, or
        writes its closing counterpart, as </think> closes <think>."""
        closing = f"</{spelling[1:]}" if re.fullmatch(r"<\w+>", spelling) else spelling
        return (bool(self.looked_for) and any(one in self._all_looked_for for one in (spelling, closing))) or (
            closing != spelling and closing in self._all_mentioned
        )

    @cached_property
    def _all_looked_for(self) -> str:
        return VISIT_END.join(self.looked_for)

    @cached_property
    def _all_mentioned(self) -> str:
        return VISIT_END.join(self.mentioned)

    def _run(self, template: jinja2.Template, request: Request, **more: Any) -> str:
        given = {"documents": None, **self._special_tokens, **request.options, **more}
        self._budget.begin([request.messages, request.tools, request.options])
        try:
            return template.render(messages=request.messages, tools=request.tools or None, **given)
        except SecurityError as error:
            raise _unsafe(error) from None
        except RecursionError:
            raise _unsafe("what it writes, or calls, is nested too deeply") from None
        except MemoryError:  # the machine's, not the conversation's
            raise
        except Exception as error:  # a template can fail in as many ways as a program
            raise Fault(f"the chat template refuses this conversation: {first_line(error)}; fix or remove it") from None


def _unsafe(why: object) -> RecipeError:
    return RecipeError(f"data.tokenizer: its chat template is not safe: {str(why)[:300]}; do not use this tokenizer")


def _strings(expression: nodes.Node) -> Iterator[str]:
    if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
        yield expression.value


# ----------------------------------------------------------------------------------- who wrote what

TRACER = "triaxis_tracer"


class _Tracer(Called):
    """The object that a traced template calls to put marks in its output.

    Only loops over messages leave marks, because templates measure and trim what other loops write.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._messages = messages
        self._numbers = {id(message): number for number, message in reversed(list(enumerate(messages)))}
        self._over_messages: set[int] = set()  # loops over messages
        self._by_number: set[int] = set()  # loops over their numbers
        # Loops over numbers that took a message in this iteration.
        self._has_taken: set[int] = set()

    def begin(self, loop: int, value: Any) -> str:
        """Return the mark for a loop that takes its next value."""
        self._has_taken.discard(loop)
        number = self._number(value)
        if number is None:
            return ""
        self._over_messages.add(loop)
        return f"{VISIT}{loop}:{number}{VISIT_END}"

    def take(self, loop: int, value: Any) -> str:
        """Return the mark for a name that gets a value inside a loop: a loop over numbers is about
        the first message it takes."""
        number = self._number(value)
        if number is None or loop in self._over_messages | self._has_taken:
            return ""
        self._by_number.add(loop)
        self._has_taken.add(loop)
        return f"{VISIT}{loop}:{number}{VISIT_END}"

    def end(self, loop: int) -> str:
        return f"{VISIT}{loop}{VISIT_END}" if loop in self._over_messages | self._by_number else ""

    def _number(self, value: Any) -> int | None:
        return self._numbers.get(id(value))


class _Tracing(NodeTransformer):
    """A transformer that has each loop of a template report the value with which it begins, and its
    end.

    Whether a loop is over messages is seen from the values.
    """

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
        # A body left by continue or break never reached its own end.
        return [node, _said("end", loop)]

    def visit_Assign(self, node: nodes.Assign, *args: Any, **kwargs: Any) -> nodes.Node | list[nodes.Node]:
        if not self._inside or not isinstance(node.target, nodes.Name):
            return node
        return [node, _said("take", self._inside[-1], nodes.Name(node.target.name, "load"))]


def _said(method: str, *arguments: nodes.Expr) -> nodes.Output:
    call = nodes.Call(nodes.Getattr(nodes.Name(TRACER, "load"), method, "load"), list(arguments), [], None, None)
    return nodes.Output([call])


def _read_marks(marked: str) -> Trace:
    """Take the marks out of a traced text, and interpret them."""
    reading = _Reading()
    at = 0
    for mark in MARK.finditer(marked):
        reading.text(marked[at : mark.start()])
        at = mark.end()
        if mark[0] == ANSWER:
            reading.answer_begin = reading.size
        elif mark[0] == ANSWER_END:
            reading.answers.append((reading.answer_begin, reading.size))
        else:
            reading.close(mark[1])
            if mark[2]:
                reading.open(mark[1], int(mark[2]))
    reading.text(marked[at:])
    times: dict[int, list[Span]] = {}
    for message, span in reading.visits:
        times.setdefault(message, []).append(span)
    turns = {message: spans[0] for message, spans in times.items() if len(spans) == 1}
    return Trace("".join(reading.pieces), turns, reading.answers, max((span[1] for _, span in reading.visits), default=0))


@dataclass
class _Reading:
    """A traced text, read up to a place. `written`: the end of its last character that is not white
    space."""

    pieces: list[str] = field(default_factory=list)
    size: int = 0
    written: int = 0
    answer_begin: int = 0
    answers: list[Span] = field(default_factory=list)
    # (loop, message, where it begins) of each.
    open_visits: list[tuple[str, int, int]] = field(default_factory=list)
    visits: list[tuple[int, Span]] = field(default_factory=list)
    open_loops: Counter[str] = field(default_factory=Counter)

    def text(self, piece: str) -> None:
        """Add the text between two marks."""
        self.pieces.append(piece)
        if stripped := piece.rstrip():
            self.written = self.size + len(stripped)
        self.size += len(piece)

    def open(self, loop: str, message: int) -> None:
        """Begin a loop's visit to a message."""
        self.open_visits.append((loop, message, self.size))
        self.open_loops[loop] += 1

    def close(self, loop: str) -> None:
        """End the visit of that loop, with those inside it."""
        while self.open_loops[loop]:
            one, message, begin = self.open_visits.pop()
            self.open_loops[one] -= 1
            if not self.open_visits and self.written > begin:
                self.visits.append((message, (begin, self.size)))


# -------------------------------------------------------------------------------------- the sandbox


class _GenerationMarks(Extension):
    """The tag {% generation %} … {% endgeneration %}, which encloses what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{ANSWER}{caller()}{ANSWER_END}"
