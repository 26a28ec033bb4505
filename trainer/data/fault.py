"""What is wrong with one record of a source, in words; whoever reads the record adds where it stands."""

from __future__ import annotations


class Fault(Exception):
    """What is wrong with one record; its reader adds where."""


def kind_of(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {"NoneType": "null", "int": "a number", "float": "a number", "list": "a list", "dict": "an object", "str": "text"}
    return names.get(type(value).__name__, type(value).__name__)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def require_characters(text: str, what: str) -> str:
    """`text`, which UTF-8 can hold; Fault otherwise."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Fault(f"{what} holds half of a surrogate pair, which is no character; mend or remove it")
    return text
