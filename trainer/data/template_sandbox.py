"""The sandbox in which chat templates run: jinja2's immutable one, where all that a template can
call is known and counted.

Methods that are not listed here are refused, and so are filters and tests that a later jinja2 may
bring. For each listed one it is known what it reads and how much it can write at most, so that it
is refused before it exceeds the budget.
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

# The current date for templates: tokens must not depend on the day.
TODAY = datetime.datetime(2024, 7, 26)
CALL_STEPS = 4  # besides those of the node
SMALL = 1 << 62
# jinja2 passes these besides the arguments of a call.
OURS = frozenset({"_loop_vars", "_block_vars"})


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that refuses at once what it refuses, and counts in `budget` what templates do."""

    # + is counted in the syntax tree.
    intercepted_binops = frozenset({"-", "*", "/", "//", "%", "**"})

    def __init__(self, *extensions: type[Extension]) -> None:
        """Configure jinja2 as transformers does, so that a template gives the same text; only the
        date is a fixed one."""
        # Constants are not folded when a template is compiled, because counting happens when it
        # runs.
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
        """Raise SecurityError, where jinja2 would write nothing and go on."""
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
            raise SecurityError(f"it computes with a number of more than {LARGEST_NUMBER:,} bits")

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
        """Raise SecurityError unless the effect of the call is known and within the budget."""
        if any(called is function for function in self._functions):
            for value in given:
                self.budget.scanned(value)
            return
        if isinstance(called, FunctionType):  # jinja2's safe wrappers of format and format_map
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
    """An object of ours whose methods a traced template calls. They read only their arguments."""


def _is_marking(called: Any) -> bool:
    return isinstance(getattr(called, "__self__", None), Extension)


# ---------------------------------------------------------------------------------------- functions


def _dict(*given: Any, **named: Any) -> dict[Any, Any]:
    return dict(*given, **named)


class _Namespace(Namespace):
    """jinja2's namespace, without names that lead into Python, and written without its contents,
    which may include itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r} in a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


# ------------------------------------------------------------------------------------------ methods

Method = Callable[[Budget, Any, tuple[Any, ...]], None]


def _method(owner: Any, name: str) -> Method | None:
    """Return the function that counts a call of that method; None for an unknown one."""
    return next((methods[name] for kind, methods in METHODS if isinstance(owner, kind) and name in methods), None)


def _over_text(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    """Count a method that reads the text once and returns at most a few times its length."""
    budget.look(len(text))
    budget.require(3 * len(text))


def _each_by_each(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    """Count a method that may read all arguments for every letter, as searches from the end and
    stripping do."""
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
    """Count a join, whose values may be the same text again and again."""
    for values in given:
        if isinstance(values, Lazy):
            raise SecurityError("it joins by a method the values that a filter yields one by one")
        budget.require(budget.size(values) + len(text) * (len(values) if hasattr(values, "__len__") else 0))


def _formatted(budget: Budget, text: Any, given: tuple[Any, ...]) -> None:
    budget.require(format_size(budget, str(text), given))


def _over_items(budget: Budget, values: Any, given: tuple[Any, ...]) -> None:
    budget.spend(len(values))


def _compared(budget: Budget, values: Any, given: tuple[Any, ...]) -> None:
    budget.scanned(values)


def _free(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Do nothing: the cost does not depend on the value."""


def _dated(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Count a date format: Python reserves at most 256 letters for each letter of the format."""
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
# Numbers are bounded, and so are the results of their methods, except `to_bytes`, which is not
# listed.
METHODS: tuple[tuple[Any, Mapping[str, Method]], ...] = (
    (str, TEXT_METHODS),
    (list | tuple, {"count": _compared, "index": _compared}),
    (list, {"copy": _over_items}),
    (dict, {"get": _free, "items": _free, "keys": _free, "values": _free, "copy": _over_items}),
    (int, dict.fromkeys(("bit_length", "bit_count", "conjugate", "as_integer_ratio"), _free)),
    (float, dict.fromkeys(("is_integer", "conjugate", "as_integer_ratio", "hex"), _free)),
    (datetime.date | datetime.time, dict.fromkeys(("isoformat", "strftime"), _dated)),
)
# The same by exact type, which serves most values.
QUICK: dict[tuple[Any, str], Method] = {
    (kind, name): method
    for kind in (str, list, tuple, dict)
    for kinds, methods in METHODS
    if issubclass(kind, kinds)
    for name, method in methods.items()
}


# ------------------------------------------------------------------------------------------ filters

# Counts what a filter is about to do with a value and its arguments, positional and by name.
Filtering = Callable[[Budget, Any, tuple[Any, ...]], None]


def _counted(function: Callable[..., Any], about_to: Filtering, budget: Budget) -> Callable[..., Any]:
    """Return jinja2's filter with counting. Values that it yields one by one are counted when they
    are taken."""
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
    """Do nothing: the filter returns its value, a part of it, another argument, or its length."""


def _one_by_one(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    pass


def _rows(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Count filters that return the rows of a list, filled up."""
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
    """Count a filter that reads a value's text and returns at most a few times its length."""
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
    """Count a filter that applies regular expressions, some of which look back over the whole text,
    and that may insert its arguments repeatedly."""
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
    """Count a filter that compares each element with some twenty others, each read by a path of
    attributes."""
    budget.look(20 * budget.size(value))
    if hasattr(value, "__len__"):
        budget.spend(len(value) * (20 + sum(map(budget.size, given))))


def _summed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Count a sum: lists are added one after another, each time into a new one."""
    _sorted(budget, value, given)
    lists = [one for one in value if isinstance(one, list | tuple)] if isinstance(value, list | tuple) else []
    budget.spend(len(lists) * sum(map(len, lists)))


def _printed(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Count pprint, which writes each container once for every container around it, to see whether
    it fits in a line."""
    size = budget.size(value) * (1 + budget.depth(value)) * 16
    budget.spend(size)
    budget.require(size)


def _json(budget: Budget, value: Any, given: tuple[Any, ...]) -> None:
    """Count JSON: letters may be escaped, and each element has a separator and indentation by its
    depth."""
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


# All of jinja2's except `random`: the same data must give the same tokens.
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
# Tests that read all of their arguments. The others check only a type or the existence.
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
    """Return jinja2's test with counting."""

    @wraps(test)
    def counted(*args: Any) -> Any:
        for one in args:
            budget.scanned(one)
        return test(*args)

    return counted
