"""Readers of text with rows in it: JSON, a list or one value after another, and delimited
values."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Generator, Iterator, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner, in json since 2.6
from typing import Any

from trainer.data.fault import Fault, first_line, kind_of

Row = dict[str, Any]
SPACE = re.compile(r"[ \t\r\n]*")
ROWS = "data"  # the key of the rows in an object such as {"version": "1.1", "data": [{…}, …]}
DELIMITERS = ",;\t|"
_decode = json.JSONDecoder().raw_decode


def json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Yield each row of a JSON text, with the offset at which it begins.

    Rows are the items of a list, the items of the list "data" of an object, or else the values
    themselves, which may follow one another. Fault if the text is not JSON.
    """
    at = _skip(text, 0)
    try:
        while at < len(text):
            if text[at] == "[":
                at = yield from _items(text, at)
            elif text[at] == "{" and (rows := _list_inside(text, at)):
                yield from _items(text, rows)
                at = _decode(text, at)[1]
            else:
                value, end = _decode(text, at)
                yield at, value
                at = end
            at = _skip(text, at)
    except (ValueError, RecursionError) as error:
        raise JSONFault(error, at) from None


class JSONFault(Fault):
    """A fault in JSON. `at`: the offset at which reading stopped [characters]."""

    def __init__(self, error: Exception, at: int) -> None:
        super().__init__(f"not JSON: {first_line(error)}; fix or remove it")
        self.at = getattr(error, "pos", at)


def _items(text: str, at: int) -> Generator[tuple[int, Any], None, int]:
    """Yield the values of the list that begins at `at`; return where it ends."""
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        value, end = _decode(text, at)
        yield at, value
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    return at + 1


def _list_inside(text: str, at: int) -> int | None:
    """Return the offset of the list of objects or texts under "data" in the object that begins at
    `at`; None if there is none."""
    at = _skip(text, at + 1)
    while text[at : at + 1] == '"':
        key, at = scanstring(text, at + 1, False)
        at = _skip(text, _skip(text, at) + 1)
        if key == ROWS and text[at : at + 1] == "[" and text[(first := _skip(text, at + 1)) : first + 1] in ("{", '"'):
            return at
        at = _skip(text, _decode(text, at)[1])
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    return None


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def row_of(value: Any) -> Row:
    """Return a JSON value that must be an object."""
    if not isinstance(value, dict):
        raise Fault(f"a JSON object is needed, this is {kind_of(value)}; fix or remove it")
    return value


def delimiter_of(name: str, line: str, columns: Sequence[str]) -> str:
    """Return the delimiter of a file with this first line: comma in .csv and tab in .tsv.

    Another delimiter is returned if it alone divides the line, and the usual one does not.
    `columns`: the names, if there is no header.
    """
    own = "\t" if name.endswith(".tsv") else ","
    values = {delimiter: len(next(csv.reader([line], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    others = [d for d in DELIMITERS if values[d] > 1 and (not columns or values[d] == len(columns))]
    return others[0] if values[own] == 1 and len(others) == 1 else own


def delimited_values(name: str, lines: Iterator[str], delimiter: str) -> Any:
    """Return the values of each line, quoted as in RFC 4180. In tab-separated files a quotation
    mark is an ordinary letter."""
    if name.endswith(".tsv") and delimiter == "\t":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def names_of_columns(values: Sequence[str]) -> list[str]:
    """Return the names in a header. Fault if a name occurs twice, because it would be ambiguous."""
    names = [name.strip() for name in values]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise Fault(f"two columns are named {twice[0]!r}; rename one of them")
    return names


def row_of_values(names: Sequence[str], values: Sequence[str]) -> Row:
    if len(values) != len(names):
        raise Fault(
            f"{len(values)} values for the {len(names)} columns {', '.join(map(repr, names))}; fix the line, or name the "
            "columns of a file without a header in data.sources[].columns"
        )
    return dict(zip(names, values, strict=True))
