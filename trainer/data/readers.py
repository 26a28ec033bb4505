"""Shards of a source → its texts or rows, read by one process alone; damage is named with its place.

`datasets` is imported only when a source needs it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.data.digests import Stamp, unreadable
from trainer.data.fault import Fault, first_line, kind_of, require_characters
from trainer.data.row_format import RowFormat
from trainer.errors import DataError, RecipeError, UserError

DELIMITED_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
Row = dict[str, Any]
Rows = Iterable[Row]
Record = TypeVar("Record")


@dataclass(frozen=True)
class LocalFile:
    """One file of a source."""

    path: str  # absolute
    name: str  # relative to the source: the fingerprint must not change when a corpus moves
    stamp: Stamp
    digest: str

    @property
    def size(self) -> int:
        return self.stamp.size


@dataclass(frozen=True)
class Shard:
    """The documents that one worker reads alone: whole files, or the range [begin, end) of one.

    The range is in bytes for JSON lines, in rows for a saved data set, and "part begin of end" for a hub data set.
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
    columns: tuple[str, ...] = ()  # names, where a delimited file has no header
    format: RowFormat | None = None  # how rows become examples; None: they are texts

    @classmethod
    def from_json(cls, value: dict[str, Any], format: type[RowFormat] | None) -> Shard:
        """Undo `dataclasses.asdict` and JSON."""
        files = tuple(LocalFile(**{**file, "stamp": Stamp(**file["stamp"])}) for file in value["files"])
        return cls(
            **{
                **value,
                "files": files,
                "columns": tuple(value["columns"]),
                "format": format(**value["format"]) if format else None,
            }
        )

    def documents(self) -> Iterator[str]:
        """The texts in order, empty ones included. DataError names the file and place of damage, or a file that changed."""
        yield from self._read(lambda row: _text_of_field(row, self.field))

    def examples(self, make: Callable[[Any], Record], unread: Counter[str] | None = None) -> Iterator[Record]:
        """What `make` makes of each example, in order; errors as for `documents`, and `make` may raise Fault too. `unread`
        counts the keys of rows that nothing reads."""
        rows = self.format
        assert rows is not None

        def of_row(row: Row) -> Record:
            if unread is not None:
                unread.update(rows.unread(row))
            return make(rows.example_of(row))

        yield from self._read(of_row)

    def texts(self) -> Iterator[str]:
        """What a tokenizer is trained on: documents, or the texts in examples."""
        if self.format is None:
            yield from self.documents()
        else:
            for example in self.examples(lambda example: example):
                yield from self.format.texts_of(example)

    def _read(self, of_row: Callable[[Row], Any]) -> Iterator[Any]:
        yield from READERS[self.kind](self, of_row)
        for file in self.files:
            file.stamp.require_unchanged(file.path)


# ---------------------------------------------------------------------------------------------- readers, one per kind

OfRow = Callable[[Row], Any]  # a record of a row; raises Fault


def _read_text(shard: Shard, of_row: OfRow) -> Iterator[str]:
    for file in shard.files:
        yield _decode(_content(file.path), "utf-8-sig", file.path)


def _read_python(shard: Shard, of_row: OfRow) -> Iterator[str]:
    """Python sources as `tokenize.open` reads them: the encoding their first lines declare, newlines made one."""
    for file in shard.files:
        content = _content(file.path)
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError as error:
            raise DataError(f"{file.path}: {error.msg}; remove it from the source") from None
        yield _decode(content, encoding, file.path).replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    """Documents of the lines that begin in [begin, end): every line belongs to one range, wherever the cuts fall."""
    path = shard.files[0].path
    try:
        with open(path, "rb") as lines:
            offset = _seek_line(lines, shard.begin)
            while offset < shard.end and (line := lines.readline()):
                if line.strip():
                    yield of_row(_row_of_line(line))
                offset += len(line)
    except Fault as fault:
        raise DataError(f"{path}:{_line_number(path, offset)}: {fault}") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _seek_line(lines: io.BufferedReader, begin: int) -> int:
    """Stand at the first line that begins at or after `begin`; returns where that is."""
    if begin:
        lines.seek(begin - 1)
        lines.readline()
    return lines.tell()


def _line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1


def _read_jsonl_gz(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    path = shard.files[0].path
    number = 0
    try:
        with gzip.open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  (named in the message below)
                if line.strip():
                    yield of_row(_row_of_line(line))
    except Fault as fault:
        raise DataError(f"{path}:{number}: {fault}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}; fetch or compress it again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _read_lines(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    """Two text files: a line of the first and its translation in the second are a row."""
    sides = [file.path for file in shard.files]
    texts = [_decode(_gunzipped(path), "utf-8-sig", path).removesuffix("\n").split("\n") for path in sides]
    if len({len(lines) for lines in texts}) > 1:
        said = " but ".join(f"{path} has {len(lines):,} lines" for path, lines in zip(sides, texts, strict=True))
        raise DataError(f"{said}: a line of one is the translation of that line of the other; correct the paths or the files")
    for number, (source, target) in enumerate(zip(*texts, strict=True), start=1):
        try:
            yield of_row({"source": source, "target": target})
        except Fault as fault:
            raise DataError(f"{sides[0]}:{number}: {fault}") from None


def _gunzipped(path: str) -> bytes:
    content = _content(path)
    if not path.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}; fetch or compress it again") from None


def _read_table(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    import datasets

    path = shard.files[0].path

    def open_rows() -> Rows:
        kind = TABLE_SUFFIXES[Path(path).suffix]
        rows: Rows = datasets.load_dataset(kind, data_files={"train": [path]}, split="train", streaming=True)
        return rows

    return _records_of_rows(open_rows, of_row, path, first_row=0)


def _read_delimited(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    """Comma-separated values quoted as RFC 4180 says; in tab-separated ones a quotation mark is a letter like others."""
    path = shard.files[0].path
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {"strict": True}
    limit = csv.field_size_limit(1 << 30)  # a document may be longer than csv's 128 KiB
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, **style)
            names = list(shard.columns) or next(rows, [])
            while True:
                line = rows.line_num + 1
                if (values := next(rows, None)) is None:
                    return
                if values:
                    yield of_row(_row_of_values(names, values))
    except (Fault, csv.Error) as fault:
        raise DataError(f"{path}:{line}: {fault}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: near line {line}: byte 0x{error.object[error.start]:02x} is not utf-8; convert it") from None
    except OSError as error:
        raise unreadable(path, error) from None
    finally:
        csv.field_size_limit(limit)


def _row_of_values(names: list[str], values: list[str]) -> Row:
    if len(values) != len(names):
        raise Fault(
            f"{len(values)} values for the {len(names)} columns {', '.join(map(repr, names))}; mend the line, or name the "
            "columns of a file without a header in data.sources[].columns"
        )
    return dict(zip(names, values, strict=True))


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
    "jsonl.gz": _read_jsonl_gz,
    "lines": _read_lines,
    "table": _read_table,
    "delimited": _read_delimited,
    "saved": _read_saved,
    "hub": _read_hub,
}


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
    """Another one when the data set changes."""
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


# ---------------------------------------------------------------------------------------------------- damage, named


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def _decode(content: bytes, encoding: str, path: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not {encoding.removesuffix('-sig')} text; "
            "convert the file or remove it from the source"
        ) from None


def _row_of_line(line: bytes) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Fault(f"byte {error.start} of the line is not utf-8; convert the file or remove the line") from None
    except (ValueError, RecursionError) as error:
        raise Fault(f"not JSON: {first_line(error)}; mend or remove the line") from None
    if not isinstance(value, dict):
        raise Fault(f"a JSON object is needed, this is {kind_of(value)}; mend or remove the line")
    return value


def _text_of_field(row: Row, field: str) -> str:
    """row[field], which must be a string that UTF-8 can hold."""
    if field not in row:
        raise Fault(f"no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}; set data.sources[].field")
    text = row[field]
    if not isinstance(text, str):
        raise Fault(f"field {field!r} is {kind_of(text)}, not text; mend the data or set data.sources[].field")
    return require_characters(text, f"field {field!r}")
