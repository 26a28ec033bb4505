"""The sandbox in which chat templates run: jinja2's immutable one, in which all that a template can call is known and counted.

What is not listed here is refused: methods, and filters and tests that a later jinja2 may bring. For each it is known what it
looks at and how much it can write at most, so that it is refused before it does what cannot be left any longer.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import wraps
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from trainer.data import template_counting as counting
from trainer.data.template_budget import (
    ELEMENT,
    LARGEST_NUMBER,
    Budget,
    Lazy,
    format_size,
    formatted_size,
    require_width,
)

TODAY = datetime.datetime(2024, 7, 26)  # what templates get for now: the same data must give the same tokens on any day
CALL_STEPS = 4  # beyond those of the node
SMALL = 1 << 62
OURS = frozenset({"_loop_vars", "_block_vars"})  # what jinja2 hands over beside the arguments of a call


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses at once what it refuses, and counts in `budget` what templates do."""

    intercepted_binops = frozenset({"-", "*", "/", "//", "%", "**"})  # + is counted in the syntax tree

    def __init__(self, *extensions: type[Extension]) -> None:
        """As transformers sets it up, so that a template gives the same text; but the date is a fixed one."""
        # Constants are not reckoned while a template is compiled: what is counted is counted when it runs.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[*extensions, loopcontrols])
        self.budget = budget = Budget()
        self.filters = {name: _counted(FILTERS[name], KNOWN_FILTERS[name], budget) for name in KNOWN_FILTERS}
        self.filters["tojson"] = _counted(_to_json, _json, budget)
        self.filters |= {
            **{counting.SPEND: budget.spend, counting.PASS: budget.passed, counting.WEIGH: budget.weighed},
            **{
                counting.SEARCH: budget.searched,
                counting.SCANNED: budget.scanned,
                counting.COPY: budget.copied,
                counting.HOLD: budget.held,
            },
        }
        self.tests = {name: _scanning(TESTS[name], budget) if name in SCANNING_TESTS else TESTS[name] for name in KNOWN_TESTS}
        self.globals = {
            **{"range": self.globals["range"], "dict": _dict, "namespace": _Namespace, "raise_exception": _refuse},
            "strftime_now": TODAY.strftime,
        }
        self._functions = (self.globals["range"], _dict, _Namespace, _refuse)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """jinja2 would write nothing in its place, and go on."""
        raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__!r}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it uses **")
        if type(left) is int is type(right) and -SMALL < left < SMALL and -SMALL < right < SMALL:
            return super().call_binop(context, operator, left, right)
        if operator == "*":
            self._require_product(left, right)
        if operator == "%" and isinstance(left, str | bytes):
            self.budget.require(formatted_size(self.budget, str(left), right))
        for side in (left, right):
            self.budget.scanned(side)
        return self.budget.held(super().call_binop(context, operator, left, right))

    def _require_product(self, left: Any, right: Any) -> None:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                require_width(other)
                self.budget.require(len(one) * other * (1 if isinstance(one, str | bytes) else ELEMENT))
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > LARGEST_NUMBER:
            raise SecurityError(f"it reckons with a number of more than {LARGEST_NUMBER:,} bits")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        budget, owner = __self.budget, getattr(__obj, "__self__", None)
        if type(__obj) is BuiltinMethodType and not kwargs.keys() - OURS:
            method = QUICK.get((type(owner), __obj.__name__))
            if method is not None:
                for value in args:
                    budget.scanned(value)
                method(budget, owner, args)
                return budget.held(__obj(*args))
        if isinstance(owner, Called):
            budget.spend(CALL_STEPS)
            return __obj(*args)
        given = (*args, *(value for name, value in kwargs.items() if name not in OURS))
        budget.spend(CALL_STEPS + len(given))
        if not isinstance(__obj, Macro | LoopContext | BlockReference) and not _is_marking(__obj):
            __self._require_known(__obj, given)
            return budget.held(super().call(__context, __obj, *args, **kwargs))
        budget.enter()
        try:
            return budget.held(super().call(__context, __obj, *args, **kwargs))
        finally:
            budget.leave()

    def _require_known(self, called: Any, given: tuple[Any, ...]) -> None:
        """SecurityError unless it is known what it does, and there is room for that."""
        if any(called is function for function in self._functions):
            for value in given:
                self.budget.scanned(value)
            return
        if isinstance(called, FunctionType):  # what jinja2 makes of format and format_map, so that they are safe
            called = getattr(called, "__wrapped__", called)
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if not callable(called) or isinstance(owner, LoopContext) or isinstance(called, Undefined):
            for value in given:
                self.budget.scanned(value)
            return
        method = _method(owner, name) if isinstance(called, BuiltinMethodType | MethodType) else None
        if method is None:
            raise SecurityError(f"it calls {name or type(called).__name__!r} of {type(owner).__name__!r}")
        for value in given:
            self.budget.scanned(value)
        method(self.budget, owner, given)


class Called:
    """What is ours and has methods that a template calls as it is traced: they look at nothing but what they are given."""


def _is_marking(called: Any) -> bool:
    return isinstance(getattr(called, "__self__", None), Extension)


# ------------------------------------------------------------------------------------------------ functions


def _dict(*given: Any, **named: Any) -> dict[Any, Any]:
    return dict(*given, **named)


class _Namespace(Namespace):
    """jinja2's, without names that lead into Python, and not written with all that it holds: it may hold itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r} in a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


# ------------------------------------------------------------------------------------------------ methods

Method = Callable[[Budget, Any, tuple[Any, ...]], None]


def _method(owner: Any, name: str) -> Method | None:
    """How a call of that method is counted; None for one that is not known."""
    return next((methods[name] for kind, methods in METHODS if isinstance(owner, kind) and name in methods), None)


def _over_text(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    """It goes over the text once, and gives no more than a few times that."""
    budget.look(len(text))
    budget.require(3 * len(text))


def _each_by_each(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    """It may look at all that is given for every letter, as searching from the end does, and stripping letters."""
    budget.look(len(text) * (1 + sum(len(one) for one in given if isinstance(one, str))))


def _split(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    _each_by_each(budget, text, given)
    budget.require(len(text))


def _widened(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    for number in given:
        require_width(number)
    budget.look(len(text))


def _tabs(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    _widened(budget, text, given)
    budget.require(len(text) + text.count("\t") * sum(number for number in given if isinstance(number, int)))


def _replaced(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    budget.look(len(text))
    old, new = (*given, "", "")[:2]
    if isinstance(old, str) and isinstance(new, str):
        budget.require(len(text) + text.count(old) * len(new))


def _joined(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    """What is joined one by one may be the same text again and again."""
    for values in given:
        if isinstance(values, Lazy):
            raise SecurityError("it joins by a method what a filter gives one by one")
        budget.require(budget.size(values) + len(text) * (len(values) if hasattr(values, "__len__") else 0))


def _formatted(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    budget.require(format_size(budget, str(text), given))


def _over_items(budget: Budget, values: Any, given: tuple[Any, ...]) -> None:
    budget.spend(len(values))


def _compared(budget: Budget, values: Any, given: tuple[Any, ...]) -> None:
    budget.scanned(values)


def _free(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """It does the same whatever it is called of."""


def _dated(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """A format gives 256 letters for each of its own at most: so much Python makes room for."""
    budget.require(256 * sum(len(one) for one in given if isinstance(one, str)))


TEXT_METHODS: Mapping[str, Method] = {
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _over_text),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"), _over_text),
    **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper"), _over_text),
    **dict.fromkeys(("startswith", "endswith", "removeprefix", "removesuffix"), _over_text),
    **dict.fromkeys(("count", "find", "index", "rfind", "rindex"), _each_by_each),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _each_by_each),
    **dict.fromkeys(("split", "rsplit", "splitlines", "partition", "rpartition"), _split),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _widened),
    "expandtabs": _tabs,
    "replace": _replaced,
    "join": _joined,
    **dict.fromkeys(("format", "format_map"), _formatted),
}
# A number is bounded, and so is what its methods give; `to_bytes` gives as much as it is asked for.
METHODS: tuple[tuple[Any, Mapping[str, Method]], ...] = (
    (str, TEXT_METHODS),
    (list | tuple, {"count": _compared, "index": _compared}),
    (list, {"copy": _over_items}),
    (dict, {"get": _free, "items": _free, "keys": _free, "values": _free, "copy": _over_items}),
    (int, dict.fromkeys(("bit_length", "bit_count", "conjugate", "as_integer_ratio"), _free)),
    (float, dict.fromkeys(("is_integer", "conjugate", "as_integer_ratio", "hex"), _free)),
    (datetime.date | datetime.time, dict.fromkeys(("isoformat", "strftime"), _dated)),
)
# By the type itself, which most values have.
QUICK: dict[tuple[Any, str], Method] = {
    (kind, name): method
    for kind in (str, list, tuple, dict)
    for kinds, methods in METHODS
    if issubclass(kind, kinds)
    for name, method in methods.items()
}


# ------------------------------------------------------------------------------------------------ filters

# What a filter is about to do with a value, further arguments and those by name.
Filtering = Callable[[Budget, Any, tuple[Any, ...]], None]


def _counted(function: Callable[..., Any], about_to: Filtering, budget: Budget) -> Callable[..., Any]:
    """A filter of jinja2, counted. What it gives one by one is counted when it is taken."""
    if about_to is _value_only:
        return function
    before = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2 hands over its context first

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        value, given = args[before], (*args[before + 1 :], *kwargs.values())
        if about_to in TAKING and isinstance(value, Lazy):
            value = list(value)
            budget.held(value)
            args = (*args[:before], value, *args[before + 1 :])
        for one in given:
            budget.scanned(one)
        about_to(budget, value, given)
        found = function(*args, **kwargs)
        if hasattr(found, "__next__"):
            return Lazy(budget, found, 8 + sum(map(budget.size, given)), value)
        return budget.held(found)

    @wraps(function)
    def quick(value: Any, *given: Any, **named: Any) -> Any:
        if type(value) is str and not given and not named:  # as most are
            return function(budget.weighed(value))
        return counted(value, *given, **named)

    return quick if about_to in (_text, _trimmed) and not before else counted


def _value_only(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """It gives the value, a part of it or another that it is given, or its length."""


def _one_by_one(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    pass


def _rows(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Rows of a list, filled up."""
    for number in given:
        require_width(number)
    budget.held(value)


def _one_read(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    budget.scanned(value)


def _rounded(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    for number in given:
        require_width(number)
    budget.scanned(value)


def _text(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """It goes over the text of a value, and gives some times that."""
    for number in given:
        require_width(number)
    budget.require(6 * budget.size(value))
    budget.scanned(value)


def _cut(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    budget.require(budget.size(value) + sum(map(budget.size, given)))
    budget.scanned(value)


def _trimmed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    size = budget.size(value)
    budget.require(size)
    budget.look(size * (1 + sum(map(budget.size, given))))


def _searched(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """It goes over a text by regular expressions, some of which look back over all of it, and may put something in again and
    again."""
    for number in given:
        require_width(number)
    size = budget.size(value)
    budget.spend(1 + (size * size >> 10))
    budget.require(6 * size + size * sum(len(one) for one in given if isinstance(one, str)))


def _indented(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    width = 4
    for one in given:
        require_width(one)
        width = len(one) if isinstance(one, str) else max(width, int(one) if isinstance(one, int) else 0)
    budget.scanned(value)
    lines = len(value.splitlines()) if isinstance(value, str) else budget.size(value)
    budget.require(budget.size(value) + (lines + 1) * width)


def _replacing(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    budget.scanned(value)
    size = budget.size(value)
    is_spelt = isinstance(value, str) and all(isinstance(one, str) for one in given[:2])
    found = max((value.count(one) for one in given if isinstance(one, str)), default=0) if is_spelt else size + 1
    budget.require(size + 6 * found * sum(map(budget.size, given)))


def _joining(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    number = len(value) if hasattr(value, "__len__") else 0
    size = budget.size(value)
    budget.look(size)
    budget.require(6 * size + number * sum(len(one) for one in given if isinstance(one, str)))


def _printf(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    budget.scanned(value)
    budget.require(formatted_size(budget, str(value), given))


def _listed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    if hasattr(value, "__len__"):
        budget.spend(len(value))
        budget.require(len(value) * ELEMENT)


def _sorted(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Each is compared with some twenty others, and read by a path of attributes."""
    budget.look(20 * budget.size(value))
    if hasattr(value, "__len__"):
        budget.spend(len(value) * (20 + sum(map(budget.size, given))))


def _summed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Lists are added one after another, each time to a new one."""
    _sorted(budget, value, given)
    lists = [one for one in value if isinstance(one, list | tuple)] if isinstance(value, list | tuple) else []
    budget.spend(len(lists) * sum(map(len, lists)))


def _printed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """It writes each container once for every one that it is in, to see whether it fits a line."""
    size = budget.size(value) * (1 + budget.depth(value)) * 16
    budget.spend(size)
    budget.require(size)


def _json(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Letters may be escaped; after each element stands what separates it, and as many spaces as it is deep."""
    for number in given:
        require_width(number)
    size = budget.size(value)
    wide = sum(one if isinstance(one, int) else budget.size(one) for one in given if one is not None)
    budget.look(size)
    budget.require(2 * size + (size // 4) * wide * (1 + budget.depth(value)))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# All of jinja2's, but `random`: the same data must give the same tokens.
KNOWN_FILTERS: Mapping[str, Filtering] = {
    **dict.fromkeys(("attr", "count", "d", "default", "first", "last", "length"), _value_only),
    **dict.fromkeys(("items", "map", "reject", "rejectattr", "select", "selectattr"), _one_by_one),
    **dict.fromkeys(("batch", "slice"), _rows),
    **dict.fromkeys(("abs", "filesizeformat", "float", "int"), _one_read),
    **dict.fromkeys(("capitalize", "center", "e", "escape", "forceescape", "lower", "safe", "string", "title"), _text),
    **dict.fromkeys(("upper", "urlencode", "wordcount", "xmlattr"), _text),
    **dict.fromkeys(("striptags", "urlize", "wordwrap"), _searched),
    **dict.fromkeys(("list", "reverse"), _listed),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _sorted),
    "sum": _summed,
    "round": _rounded,
    "trim": _trimmed,
    "truncate": _cut,
    "indent": _indented,
    "replace": _replacing,
    "join": _joining,
    "format": _printf,
    "pprint": _printed,
    "tojson": _json,
}
REFUSED_FILTERS = frozenset({"random"})
# Tests that look at all of what they are given; the others ask for its type, or whether it is there.
SCANNING_TESTS = frozenset(
    {"in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"}
    | {"lower", "upper", "divisibleby", "even", "odd"}
)
KNOWN_TESTS = SCANNING_TESTS | {
    *("boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer", "iterable", "mapping", "none"),
    *("number", "sameas", "sequence", "string", "test", "true", "undefined"),
}
TAKING = frozenset({_rows, _listed, _sorted, _summed, _joining})  # they go over all values


def _scanning(test: Any, budget: Budget) -> Callable[..., Any]:
    """A test of jinja2, counted."""

    @wraps(test)
    def counted(*args: Any) -> Any:
        for one in args:
            budget.scanned(one)
        return test(*args)

    return counted
