"""A JSON reader that keeps the place of each value: `json.loads` tells neither where a key stands
nor that it occurs twice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner, in json since 2.6
from typing import Any, NoReturn

from trainer.recipe.marks import KeyPath

MAX_DEPTH = 32
MAX_VALUES = 20_000  # a thousand sources with every key

# ASCII, because int() and float() read the digits of all scripts.
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
WORDS = {"true": True, "false": False, "null": None}
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "TRUE": "true", "FALSE": "false", "NULL": "null"}
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf")


class JSONSyntaxError(Exception):
    """A syntax error. `position`: where reading stopped [characters from the start of the text]."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class Reader:
    """A reader of JSON as in RFC 8259, and stricter: no duplicate keys, no number outside float64,
    bounded depth.

    `json.loads` keeps the last of two equal keys, accepts NaN, and forgets where anything stood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[KeyPath, int] = {}
        self.duplicates: list[tuple[KeyPath, int]] = []

    def document(self) -> Any:
        value = self._value(())
        self._skip()
        if self.at < len(self.text):
            self._fail("more text after the end of the value")
        return value

    def _value(self, path: KeyPath) -> Any:
        self._skip()
        if len(path) > MAX_DEPTH:
            self._fail(f"nested deeper than {MAX_DEPTH}: not a recipe")
        if len(self.places) > MAX_VALUES:
            self._fail(f"more than {MAX_VALUES} values: not a recipe")
        match self._peek():
            case "{":
                return self._object(path)
            case "[":
                return self._list(path)
            case '"':
                return self._string()
            case _:
                return self._scalar()

    def _object(self, path: KeyPath) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for place in self._items("}", "key"):
            if self._peek() != '"':
                self._fail("a key in double quotes is expected here")
            key = self._string()
            self._skip()
            if self._peek() != ":":
                self._fail(f"':' is expected after the key {json.dumps(key)}")
            self.at += 1
            if key in value:
                self.duplicates.append(((*path, key), place))
            self.places[*path, key] = place
            value[key] = self._value((*path, key))
        return value

    def _list(self, path: KeyPath) -> list[Any]:
        value: list[Any] = []
        for place in self._items("]", "value"):
            self.places[*path, len(value)] = place
            value.append(self._value((*path, len(value))))
        return value

    def _items(self, end: str, what: str) -> Iterator[int]:
        """Yield the place of each item between brackets. The caller reads the item before asking
        for the next."""
        self.at += 1
        self._skip()
        if self._peek() == end:
            self.at += 1
            return
        while True:
            yield self.at
            self._skip()
            if self._peek() == end:
                self.at += 1
                return
            if self._peek() != ",":
                self._fail(f"',' or '{end}' is expected here" + (": the file ends too early" if not self._peek() else ""))
            comma = self.at
            self.at += 1
            self._skip()
            if self._peek() == end:
                raise JSONSyntaxError(comma, f"trailing comma: no {what} follows; remove it")

    def _string(self) -> str:
        try:
            value, end = scanstring(self.text, self.at + 1, True)
        except json.JSONDecodeError as error:
            raise JSONSyntaxError(error.pos, error.msg.rstrip(" at").lower()) from None
        if any("\ud800" <= char <= "\udfff" for char in value):
            self._fail("half of a surrogate pair is not a character")
        self.at = end
        return str(value)

    def _scalar(self) -> Any:
        for word, meaning in WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        number = NUMBER.match(self.text, self.at)
        if number is None:
            self._fail_scalar()
        value = float(number.group())
        if value in (float("inf"), float("-inf")):
            self._fail("number too large for a float64")
        self.at = number.end()
        return value if number.group(1) or number.group(2) else int(number.group())

    def _fail_scalar(self) -> NoReturn:
        rest = self.text[self.at : self.at + 16]
        for word in NOT_NUMBERS:
            if rest.startswith(word):
                self._fail(f"{word} is not a JSON number; write a finite one")
        for word, json_word in PYTHON_WORDS.items():
            if rest.startswith(word):
                self._fail(f"{word} is Python; JSON writes {json_word}")
        if rest.startswith("'"):
            self._fail("strings take double quotes")
        self._fail("a value is expected here" if rest else "the file ends where a value is expected")

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        if self._peek() in ("/", "#"):
            self._fail('JSON has no comments; write them in "description"')

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _fail(self, message: str) -> NoReturn:
        raise JSONSyntaxError(self.at, message)
