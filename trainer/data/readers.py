"""The readers of a source's shards, one process each: they yield texts or rows, and name damage
with its place.

`datasets` is imported only when a source needs it.
"""

from __future__ import annotations

import csv
import io
import json
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from trainer.data.digests import Stamp, unreadable
from trainer.data.fault import Fault, first_line, kind_of, require_characters
from trainer.data.files import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    LONGEST_ROW,
    LOOKED_AT,
    content_of,
    decoded,
    foreign,
    is_wide,
    lines_of,
    opened,
    packing_of,
    unpacked,
    unpacked_name,
)
from trainer.data.kinds import TABLE_SUFFIXES, suffix_of
from trainer.data.row_files import (
    JSONFault,
    Row,
    delimited_values,
    json_rows,
    names_of_columns,
    row_of,
    row_of_values,
)
from trainer.data.row_format import RowFormat, unread_of
from trainer.errors import DataError, RecipeError, UserError

Rows = Iterable[Row]
Record = TypeVar("Record")


@dataclass(frozen=True)
class LocalFile:
    """A file of a source."""

    path: str  # absolute
    name: str  # relative to the source, so that the fingerprint stays when a corpus moves
    stamp: Stamp
    digest: str

    @property
    def size(self) -> int:
        return self.stamp.size


@dataclass(frozen=True)
class Shard:
    """A set of documents that one worker reads alone: whole files, or the range [begin, end) of
    one.

    The range is in bytes for JSON lines, in rows for a saved data set, and "part begin of end" for
    a hub data set.
    """

    kind: str  # a key of READERS
    where: str  # the recipe's name of the source, such as data.sources[0]
    files: tuple[LocalFile, ...] = ()
    begin: int = 0
    end: int = 0
    size: int = 1  # for progress [bytes; parts of a hub data set]
    path: str = ""
    field: str = ""
    split: str = ""
    columns: tuple[str, ...] = ()  # names of the columns of a delimited file without a header
    delimiter: str = ""  # of a delimited file
    format: RowFormat | None = None  # makes examples from rows; None: rows are texts
    limit: int | None = None  # the rows that are read, from the first; None: all

    @classmethod
    def from_json(cls, value: dict[str, Any], format: type[RowFormat] | None) -> Shard:
        """Build a shard from the JSON of its `dataclasses.asdict`."""
        files = tuple(LocalFile(**{**file, "stamp": Stamp(**file["stamp"])}) for file in value["files"])
        return cls(
            **{
                **value,
                "files": files,
                "columns": tuple(value["columns"]),
                "format": format(**value["format"]) if format else None,
            }
        )

    def documents(self, unread: Counter[str] | None = None) -> Iterator[str]:
        """Yield the texts in order, empty ones included.

        `unread` counts the keys of rows that nothing reads. DataError names the file and place of
        damage, or a file that changed.
        """

        def text_of(row: Any) -> str:
            if isinstance(row, str):  # an item of a JSON list
                return require_characters(row, "the text")
            if unread is not None and isinstance(row, dict):
                unread.update(unread_of(row, {self.field}))
            return _text_of_field(row_of(row), self.field)

        yield from self._read(text_of)

    def examples(self, make: Callable[[Any], Record], unread: Counter[str] | None = None) -> Iterator[Record]:
        """Yield what `make` returns for each example, in order. Errors are those of `documents`,
        and Faults of `make`.

        `unread` counts the keys of rows that nothing reads.
        """
        rows = self.format
        assert rows is not None

        def make_of(row: Any) -> Record:
            found = row_of(row)
            if unread is not None:
                unread.update(rows.unread(found))
            return make(rows.example_of(found))

        yield from self._read(make_of)

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: documents, or the texts in examples."""
        if self.format is None:
            yield from self.documents()
        else:
            for example in self.examples(lambda example: example):
                yield from self.format.texts_of(example)

    def num_rows(self, most: int | None) -> int:
        """Return the number of rows, at most `most`. Errors are those of reading them."""
        if self.kind in FILE_IS_ROW:
            return min(len(self.files), len(self.files) if most is None else most)
        return sum(1 for _ in islice(READERS[self.kind](self, lambda row: row), most))

    def _read(self, of_row: Callable[[Row], Any]) -> Iterator[Any]:
        rows = READERS[self.kind](self, of_row)
        yield from rows if self.limit is None else islice(rows, self.limit)
        for file in self.files:
            file.stamp.require_unchanged(file.path)


# ---------------------------------------------------------------------------- readers, one per kind

OfRow = Callable[[Any], Any]  # makes a record of a row; raises Fault


def _read_text(shard: Shard, of_row: OfRow) -> Iterator[str]:
    for file in shard.files:
        yield decoded(content_of(file.path), file.path)


def _read_python(shard: Shard, of_row: OfRow) -> Iterator[str]:
    """Yield Python sources as `tokenize.open` reads them, in the encoding that their first lines
    declare, with uniform newlines."""
    for file in shard.files:
        content = content_of(file.path)
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError as error:
            raise DataError(f"{file.path}: {error.msg}; remove it from the source") from None
        yield decoded(content, file.path, encoding).replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    path = shard.files[0].path
    yield from _read_packed_jsonl(path, of_row) if packing_of(path) else _read_jsonl_range(shard, path, of_row)


def _read_jsonl_range(shard: Shard, path: str, of_row: OfRow) -> Iterator[Any]:
    """Yield documents of the lines that begin in [begin, end): every line belongs to one range,
    wherever the cuts fall."""
    try:
        with opened(path) as lines:
            offset = _seek_line(lines, shard.begin)
            for line in lines_of(lines) if offset < shard.end else ():
                if (content := line if offset else line.removeprefix(BYTE_ORDER_MARK)).strip():
                    yield of_row(_value_of_line(content))
                offset += len(line)
                if offset >= shard.end:
                    return
    except Fault as fault:
        raise DataError(f"{path}:{_line_number(path, offset)}: {fault}") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _seek_line(lines: io.BufferedReader, begin: int) -> int:
    """Seek the first line that begins at or after `begin`, and return its offset."""
    if begin:
        lines.seek(begin - 1)
        while (part := lines.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
            pass
    return lines.tell()


def _line_number(path: str, offset: int) -> int:
    number = 1
    with opened(path) as file:
        while chunk := file.read(min(CHUNK_BYTES, offset)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


def _read_packed_jsonl(path: str, of_row: OfRow) -> Iterator[Any]:
    number = 0
    try:
        with unpacked(path) as file:
            lines = lines_of(file)
            while True:
                number += 1
                if (line := next(lines, None)) is None:
                    return
                if (content := line if number > 1 else line.removeprefix(BYTE_ORDER_MARK)).strip():
                    yield of_row(_value_of_line(content))
    except Fault as fault:
        raise DataError(f"{path}:{number}: {fault}") from None


def _read_json(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    """Yield the rows of a list, of the list "data" of an object, or rows one after another."""
    path = shard.files[0].path
    text = decoded(content_of(path), path)
    at = 0
    try:
        for at, row in json_rows(text):  # noqa: B007  (named in the message below)
            yield of_row(row)
    except Fault as fault:
        at = fault.at if isinstance(fault, JSONFault) else at
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: {fault}") from None


def _read_lines(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    """Yield a row for each line of the first text file and its translation in the second."""
    sides = [file.path for file in shard.files]
    texts = [decoded(content_of(path), path).removesuffix("\n").split("\n") for path in sides]
    shorter = min(map(len, texts))
    # Empty lines at the end do not count.
    if any(line.strip() for lines in texts for line in lines[shorter:]):
        said = " but ".join(f"{path} has {len(lines):,} lines" for path, lines in zip(sides, texts, strict=True))
        raise DataError(f"{said}: each line must have its translation in the other; correct the paths or the files")
    for number, (source, target) in enumerate(zip(*texts, strict=False), start=1):
        try:
            yield of_row({"source": source, "target": target})
        except Fault as fault:
            raise DataError(f"{sides[0]}:{number}: {fault}") from None


def _read_table(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    import datasets

    path = shard.files[0].path

    def open_rows() -> Rows:
        kind = TABLE_SUFFIXES[suffix_of(path)]
        rows: Rows = datasets.load_dataset(kind, data_files={"train": [path]}, split="train", streaming=True)
        return rows

    return _records_of_rows(open_rows, of_row, path, first_row=0)


def _read_delimited(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    path = shard.files[0].path
    limit = csv.field_size_limit(LONGEST_ROW)  # a document may be longer than csv's 128 KiB
    line = 0
    try:
        with unpacked(path) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as file:
            if is_wide(beginning := content.peek(LOOKED_AT)[:LOOKED_AT]):
                raise Fault(foreign(beginning))
            rows = delimited_values(unpacked_name(path), lines_of(file), shard.delimiter)
            line = 1
            names = list(shard.columns) or names_of_columns(next(rows, []))
            while True:
                line = rows.line_num + 1
                if (values := next(rows, None)) is None:
                    return
                if values:
                    yield of_row(row_of_values(names, values))
    except (Fault, csv.Error) as fault:
        raise DataError(f"{path}:{line}: {fault}") from None
    except UnicodeDecodeError as error:
        said = foreign(error.object, error.start) or "convert it"
        raise DataError(f"{path}: near line {line}: byte 0x{error.object[error.start]:02x} is not utf-8; {said}") from None
    finally:
        csv.field_size_limit(limit)


def _read_saved(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    def open_rows() -> Rows:
        rows: Rows = open_saved(shard.path, shard.split, shard.where).select(range(shard.begin, shard.end))
        return rows

    return _records_of_rows(open_rows, of_row, shard.path, first_row=shard.begin)


def _read_hub(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    def open_rows() -> Rows:
        rows: Rows = open_hub(shard.path, shard.split).shard(num_shards=shard.end, index=shard.begin)
        return rows

    return _records_of_rows(open_rows, of_row, f"{shard.path} (part {shard.begin + 1} of {shard.end})", first_row=0)


READERS: dict[str, Callable[[Shard, OfRow], Iterator[Any]]] = {
    "text": _read_text,
    "python": _read_python,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "lines": _read_lines,
    "table": _read_table,
    "delimited": _read_delimited,
    "saved": _read_saved,
    "hub": _read_hub,
}
# the kinds whose files are one row each
FILE_IS_ROW = ("text", "python")
# the kinds whose rows are fetched from elsewhere as they are read
FETCHED = ("hub",)


def open_saved(root: str, split: str, where: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(root)
    except Exception as error:  # datasets raises whatever its reader raises
        raise DataError(f"{root}: a damaged or empty saved data set: {first_line(error)}; save it again") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise RecipeError(f"{where}.split: {root} has no split {split!r}; it has {', '.join(sorted(saved))}")
    return saved[split]


def hub_revision(name: str) -> str:
    """Return the revision of a hub data set, which differs when the data set changes."""
    import datasets

    return str(datasets.load_dataset_builder(name).hash)


def open_hub(name: str, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, split=split, streaming=True)


def _records_of_rows(open_rows: Callable[[], Rows], of_row: OfRow, name: str, first_row: int) -> Iterator[Any]:
    number = first_row
    try:
        for number, row in enumerate(open_rows(), start=first_row):  # noqa: B007  (named in the messages below)
            yield of_row(row)
    except Fault as fault:
        raise DataError(f"{name}: row {number}: {fault}") from None
    except UserError:
        raise
    except Exception as error:  # datasets raises whatever its reader raises
        raise DataError(f"{name}: cannot be read beyond row {number}: {first_line(error)}; fetch or write it again") from None


# ------------------------------------------------------------------------------------ damage, named


def _value_of_line(line: bytes) -> Any:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        said = foreign(line, error.start) or "convert the file or remove the line"
        raise Fault(f"byte {error.start} of the line is not utf-8; {said}") from None
    except (ValueError, RecursionError) as error:
        said = foreign(line) if is_wide(line) else "fix or remove the line"
        raise Fault(f"not JSON: {first_line(error)}; {said}") from None
    if not isinstance(value, dict):
        raise Fault(f"a JSON object is needed, this is {kind_of(value)}; fix or remove the line")
    return value


def _text_of_field(row: Row, field: str) -> str:
    """Return row[field], which must be a string that UTF-8 can hold."""
    if field not in row:
        raise Fault(f"no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}; set data.sources[].field")
    text = row[field]
    if not isinstance(text, str):
        raise Fault(f"field {field!r} is {kind_of(text)}, not text; fix the data or set data.sources[].field")
    return require_characters(text, f"field {field!r}")
