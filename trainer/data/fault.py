"""The exception for one bad record of a source; the reader of the record adds its place."""

from __future__ import annotations


class Fault(Exception):
    """A description of what is wrong with one record; its reader adds the place."""


def kind_of(value: object) -> str:
    """Return the JSON type of a value, in words."""
    names = {"NoneType": "null", "int": "a number", "float": "a number", "list": "a list", "dict": "an object", "str": "text"}
    return names.get(type(value).__name__, type(value).__name__)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def require_characters(text: str, what: str) -> str:
    """Return `text` if UTF-8 can hold it; Fault otherwise."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Fault(f"{what} holds half of a surrogate pair, which is not a character; fix or remove it")
    return text
