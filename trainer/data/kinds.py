"""The kind of a file, text or rows of some format, by its name, and where that is not enough by how
it begins.

JSON, .csv and .tsv files hold rows or are texts themselves, such as the settings in a folder of
source code. They count as rows if their first row has the text's field, or if the recipe says that
it must.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.fault import Fault
from trainer.data.files import BYTE_ORDER_MARK, LONGEST_ROW, is_wide, unpacked, unpacked_name
from trainer.data.row_files import delimited_values, delimiter_of, json_rows, names_of_columns

JSONL_SUFFIXES = (".jsonl", ".ndjson")
DELIMITED_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
MAYBE_ROWS = (".json", *DELIMITED_SUFFIXES)
TEXT_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("txt", "text", "md", "rst", "tex", "html", "htm", "xml", "yaml", "yml", "toml", "ini", "log"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "rs", "go", "java", "kt", "scala", "js", "ts", "jsx", "tsx", "css"),
        *("rb", "php", "pl", "lua", "jl", "r", "m", "swift", "sh", "sql", "hs", "ml", "lisp", "el", "tcl"),
    )
)
ROW_SUFFIXES = (*JSONL_SUFFIXES, *MAYBE_ROWS, *TABLE_SUFFIXES)
FIRST_BYTES = 1 << 16  # searched for the first row; four times as many if that is longer


@dataclass(frozen=True)
class Kind:
    """A kind of file. `reader`: a key of `readers.READERS`. `delimiter`: of delimited values."""

    reader: str
    delimiter: str = ""

    def is_plain(self, name: str, *, in_rows: bool) -> bool:
        """Return whether the name alone says as much. If not, the kind is one of the facts recorded
        of the source."""
        by_name = {"jsonl": (".jsonl", ".jsonl.gz", ".ndjson"), "table": tuple(TABLE_SUFFIXES)}
        if in_rows and self.delimiter == ("\t" if name.endswith(".tsv") else ","):
            by_name["delimited"] = DELIMITED_SUFFIXES
        return self.reader in ("text", "python") or name.endswith(by_name.get(self.reader, ()))


TEXT = Kind("text")


@dataclass(frozen=True)
class Wanted:
    """The rows that are looked for in a source.

    `field`: the field of the text, or None if the rows are a task's. `must`: the recipe names the
    field, so every file that may hold rows holds them. `alone`: the source is this file.
    """

    field: str | None
    columns: Sequence[str]
    must: bool
    alone: bool


def suffix_of(name: str) -> str:
    return Path(unpacked_name(name)).suffix


def is_known(name: str) -> bool:
    return suffix_of(name) in TEXT_SUFFIXES or suffix_of(name) in ROW_SUFFIXES


def kind_of_file(path: str, wanted: Wanted) -> Kind:
    """Return the kind of a file. DataError if the file must be read for that and cannot be."""
    suffix = suffix_of(path)
    if suffix in TABLE_SUFFIXES:
        return Kind("table")
    if suffix in JSONL_SUFFIXES:
        return Kind("json") if _beginning(path, 64).lstrip().startswith(b"[") else Kind("jsonl")
    if suffix == ".json":
        return _kind_of_json(path, wanted)
    if suffix in DELIMITED_SUFFIXES:
        return _kind_of_delimited(path, wanted)
    return TEXT


UNREADABLE = object()


def _kind_of_json(path: str, wanted: Wanted) -> Kind:
    first = _first_row(path)
    rows = Kind("jsonl" if first.in_lines else "json")
    if wanted.field is None:
        return rows if first.row is UNREADABLE or isinstance(first.row, Mapping) else TEXT
    return rows if wanted.must or (first.of_several and (wanted.alone or first.has_text(wanted.field))) else TEXT


@dataclass(frozen=True)
class _First:
    """The first row of a JSON file, UNREADABLE if it has none. `in_lines`: the file has one object
    per line."""

    row: Any
    in_lines: bool = False
    in_list: bool = False

    @property
    def of_several(self) -> bool:
        """Return whether the row is one of several. An object alone in its file is more likely a
        text, such as settings."""
        return isinstance(self.row, Mapping | str) and (self.in_lines or self.in_list)

    def has_text(self, field: str) -> bool:
        return isinstance(self.row, str) or isinstance(self.row.get(field, self), str | None)


def _first_row(path: str) -> _First:
    size = FIRST_BYTES
    while True:
        content = _beginning(path, size)
        text = content.decode(errors="replace").lstrip()
        line, _, more = text.partition("\n")
        if more.strip() and line.startswith("{") and line.rstrip().endswith("}"):
            first = _first_of(line)
            if isinstance(first.row, Mapping) and not first.in_list:
                return _First(first.row, in_lines=True)
        first = _first_of(text)
        if first.row is not UNREADABLE or len(content) < size or size >= LONGEST_ROW:
            return first
        size *= 4


def _first_of(text: str) -> _First:
    try:
        at, row = next(json_rows(text), (0, UNREADABLE))
    except Fault:
        return _First(UNREADABLE)
    return _First(row, in_list=at > 0)


def _kind_of_delimited(path: str, wanted: Wanted) -> Kind:
    beginning = _beginning(path, FIRST_BYTES)
    lines = list(io.StringIO("" if is_wide(beginning) else beginning.decode(errors="replace"), newline=""))
    name = unpacked_name(path)
    delimiter = delimiter_of(name, lines[0] if lines else "", wanted.columns)
    if wanted.field is None or wanted.must or wanted.columns or wanted.alone:
        return Kind("delimited", delimiter)
    try:
        header = names_of_columns(next(delimited_values(name, iter(lines), delimiter), []))
    except (Fault, csv.Error):
        return TEXT
    return Kind("delimited", delimiter) if wanted.field in header else TEXT


def _beginning(path: str, size: int) -> bytes:
    with unpacked(path) as file:
        return file.read(size).removeprefix(BYTE_ORDER_MARK)
