"""Sources of documents: what a recipe names → shards that worker processes read alone → texts or conversations.

A `Corpus` is one source looked at from outside: its shards, its fingerprint, and what was passed over. A `Shard` says in plain
JSON which documents one worker reads; the documents of a source are those of its shards in order, whoever reads them.
`datasets` is imported here only, when a source needs it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from trainer import sections
from trainer.data.conversations import ChatRows, Conversation
from trainer.data.digests import Digests, Stamp, fingerprint_of, unreadable
from trainer.data.fault import Fault, first_line, kind_of, require_characters
from trainer.errors import DataError, RecipeError, UserError

MIN_SHARD_BYTES = 2 << 20  # a few seconds of one core: what a killed build loses at most per worker
MAX_SHARDS = 1024  # per source, so that a huge source does not become a huge folder

TEXT_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("txt", "text", "md", "rst", "tex", "html", "htm", "xml", "csv", "tsv", "json", "yaml", "yml", "toml", "ini", "log"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "rs", "go", "java", "kt", "scala", "js", "ts", "jsx", "tsx", "css"),
        *("rb", "php", "pl", "lua", "jl", "r", "m", "swift", "sh", "sql", "hs", "ml", "lisp", "el", "tcl"),
    )
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson")
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
ROW_FILES = (*JSONL_SUFFIXES, *TABLE_SUFFIXES)
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
Row = dict[str, Any]
Rows = Iterable[Row]
Record = TypeVar("Record")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


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
    chat: ChatRows | None = None  # how rows become conversations; None: they are texts

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Shard:
        """Undo `dataclasses.asdict` and JSON."""
        files = tuple(LocalFile(**{**file, "stamp": Stamp(**file["stamp"])}) for file in value["files"])
        chat = ChatRows(**value["chat"]) if value.get("chat") else None
        return cls(**{**value, "files": files, "chat": chat})

    def documents(self) -> Iterator[str]:
        """The texts in order, empty ones included. DataError names the file and place of damage, or a file that changed."""
        yield from self._read(lambda row: _text_of_field(row, self.field))

    def conversations(self, make: Callable[[Conversation], Record]) -> Iterator[Record]:
        """What `make` makes of each conversation, in order; errors as for `documents`, and `make` may raise Fault too."""
        rows = self.chat
        assert rows is not None
        yield from self._read(lambda row: make(rows.conversation_of(row)))

    def texts(self) -> Iterator[str]:
        """What a tokenizer is trained on: documents, or what is said in conversations."""
        if self.chat is None:
            yield from self.documents()
        else:
            for conversation in self.conversations(lambda conversation: conversation):
                yield from (message.content for message in conversation)

    def _read(self, of_row: Callable[[Row], Any]) -> Iterator[Any]:
        yield from READERS[self.kind](self, of_row)
        for file in self.files:
            file.stamp.require_unchanged(file.path)


@dataclass(frozen=True)
class Corpus:
    """One source, looked at but not read: enough to know whether it was tokenized before, and to divide the work."""

    name: str
    where: str
    shards: tuple[Shard, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def documents(self) -> Iterator[str]:
        """All texts in order."""
        for shard in self.shards:
            yield from shard.documents()

    def as_conversations(self, source: sections.Source) -> Corpus:
        """The same source, its rows read as conversations; RecipeError when no file of it has rows."""
        texts = [file.name for shard in self.shards if shard.kind in ("text", "python") for file in shard.files]
        shards = [shard for shard in self.shards if shard.kind not in ("text", "python")]
        if not shards:
            raise RecipeError(
                f"{self.where}.path: {source.path!r} is text ({texts[0]}), which holds no conversations; data.task sft reads "
                f"{', '.join(ROW_FILES)}, saved and hub data sets (a JSON list becomes rows by jq -c '.[]')"
            )
        notes = [f"{self.where}: text files passed over in {source.path}: {', '.join(texts)}"] if texts else []
        fields = source.fields.model_dump(exclude_none=True) if source.fields else {}
        rows = ChatRows(source.shape or "", fields)
        fingerprint = fingerprint_of(["conversations", self.fingerprint, rows.shape, rows.fields])
        return replace(
            self,
            shards=tuple(replace(shard, chat=rows) for shard in shards),
            fingerprint=fingerprint,
            notes=(*self.notes, *notes),
        )


def look_at(source: sections.Source, *, where: str, digests: Digests, chat: bool = False) -> Corpus:
    """Find what `source` names and divide it into shards.

    `where` is the recipe's name of the source for messages. `chat`: its rows are conversations, not texts. RecipeError when
    there is nothing of that name, DataError when it holds no document or cannot be read.
    """
    corpus = _find(source, where, digests)
    return corpus.as_conversations(source) if chat else corpus


def _find(source: sections.Source, where: str, digests: Digests) -> Corpus:
    if source.path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"]
        return _corpus_of_files(source, where, root, files, digests, text_kind="python")
    path = Path(source.path).expanduser()
    if path.is_file():
        return _corpus_of_files(source, where, path.absolute().parent, [path.absolute()], digests)
    if path.is_dir():
        return _corpus_of_folder(source, where, path.absolute(), digests)
    if _looks_local(source.path):
        raise RecipeError(f"{where}.path: no such file or folder: {source.path!r} (from {Path.cwd()}); correct the path")
    if not HUB_NAME.match(source.path):
        raise RecipeError(
            f"{where}.path: {source.path!r} is neither a file or folder here nor a hub name (owner/name); correct the path"
        )
    return _corpus_of_hub(source, where)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or _is_jsonl(path) or Path(path).suffix in {*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".gz"}


def _is_jsonl(path: str) -> bool:
    return path.endswith(JSONL_SUFFIXES)


def _corpus_of_folder(source: sections.Source, where: str, root: Path, digests: Digests) -> Corpus:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _corpus_of_saved(source, where, root, digests)
    found = list(_walk(root))
    known = [path for path in found if _is_jsonl(path.name) or path.suffix in TEXT_SUFFIXES or path.suffix in TABLE_SUFFIXES]
    corpus = _corpus_of_files(source, where, root, known, digests)
    skipped = Counter(path.suffix or path.name for path in set(found) - set(known))
    if not skipped:
        return corpus
    kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(skipped.items()))
    return replace(corpus, notes=(f"{where}: files of unknown kind passed over in {source.path}: {kinds}",))


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below root, sorted by relative path; hidden ones, and folders named in `skip`, are left out."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    found = []
    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _corpus_of_files(
    source: sections.Source, where: str, root: Path, paths: list[Path], digests: Digests, text_kind: str = "text"
) -> Corpus:
    stamped = digests.of([str(path) for path in paths])
    files = [
        LocalFile(str(path), path.relative_to(root).as_posix(), stamp, digest)
        for path, (stamp, digest) in zip(paths, stamped, strict=True)
    ]
    if not any(file.size for file in files):
        raise DataError(f"{where}: {source.path!r} holds no document ({len(files)} files, 0 bytes of text); correct the path")
    return Corpus(
        name=source.path,
        where=where,
        shards=tuple(_divide(files, text_kind, where, source.field)),
        fingerprint=fingerprint_of(
            {"kind": text_kind, "field": source.field, "files": [[file.name, file.size, file.digest] for file in files]}
        ),
    )


def _divide(files: list[LocalFile], text_kind: str, where: str, field: str) -> Iterator[Shard]:
    """Shards of about equal size: small text files together, long JSON-lines files in ranges, other files one by one."""
    shard_bytes = max(MIN_SHARD_BYTES, sum(file.size for file in files) // MAX_SHARDS)
    gathered: list[LocalFile] = []
    gathered_bytes = 0

    def gathered_shard() -> Iterator[Shard]:
        nonlocal gathered_bytes
        if gathered:
            yield Shard(text_kind, where, tuple(gathered), size=gathered_bytes)
        gathered.clear()
        gathered_bytes = 0

    for file in files:
        suffix = Path(file.path).suffix
        if not _is_jsonl(file.path) and suffix not in TABLE_SUFFIXES:
            gathered.append(file)
            gathered_bytes += file.size
            if gathered_bytes >= shard_bytes:
                yield from gathered_shard()
            continue
        yield from gathered_shard()
        if suffix == ".gz":
            yield Shard("jsonl.gz", where, (file,), size=file.size, field=field)
        elif suffix in TABLE_SUFFIXES:
            yield Shard("table", where, (file,), size=file.size, field=field)
        else:
            for begin in range(0, file.size, shard_bytes):
                end = min(begin + shard_bytes, file.size)
                yield Shard("jsonl", where, (file,), begin=begin, end=end, size=end - begin, field=field)
    yield from gathered_shard()


def _corpus_of_saved(source: sections.Source, where: str, root: Path, digests: Digests) -> Corpus:
    paths = [str(path) for path in _walk(root)]
    files = tuple(
        LocalFile(path, Path(path).relative_to(root).as_posix(), stamp, digest)
        for path, (stamp, digest) in zip(paths, digests.of(paths), strict=True)
    )
    rows = len(_open_saved(str(root), source.split, where))
    if not rows:
        raise DataError(f"{where}: {source.path!r} holds no document (0 rows in split {source.split!r}); correct the path")
    size = sum(file.size for file in files)
    parts = min(rows, max(1, min(MAX_SHARDS, size // MIN_SHARD_BYTES)))
    cuts = [rows * part // parts for part in range(parts + 1)]
    shards = [
        Shard("saved", where, files, begin, end, max(1, size // parts), str(root), source.field, source.split)
        for begin, end in pairwise(cuts)
    ]
    facts = [[file.name, file.size, file.digest] for file in files]
    fingerprint = fingerprint_of({"kind": "saved", "field": source.field, "split": source.split, "files": facts})
    return Corpus(source.path, where, tuple(shards), fingerprint)


def _corpus_of_hub(source: sections.Source, where: str) -> Corpus:
    """A hub data set; its revision is part of the fingerprint, so that a changed data set is tokenized anew."""
    import datasets

    try:
        revision = datasets.load_dataset_builder(source.path).hash
        parts = _open_hub(source.path, source.split).num_shards
    except Exception as error:  # datasets, its hub client and its HTTP client each raise kinds of their own
        raise RecipeError(
            f"{where}.path: no file or folder {source.path!r} here, and not to be had from the hub: {first_line(error)}; "
            "correct the path, or data.sources[].split, or bring the data here as a folder"
        ) from None
    shards = [
        Shard("hub", where, begin=part, end=parts, path=source.path, field=source.field, split=source.split)
        for part in range(parts)
    ]
    facts = {"kind": "hub", "path": source.path, "revision": revision, "field": source.field, "split": source.split}
    return Corpus(source.path, where, tuple(shards), fingerprint_of(facts))


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


def _read_table(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    import datasets

    path = shard.files[0].path

    def open_rows() -> Rows:
        kind = TABLE_SUFFIXES[Path(path).suffix]
        rows: Rows = datasets.load_dataset(kind, data_files={"train": [path]}, split="train", streaming=True)
        return rows

    return _records_of_rows(open_rows, of_row, path, first_row=0)


def _read_saved(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    def open_rows() -> Rows:
        rows: Rows = _open_saved(shard.path, shard.split, shard.where).select(range(shard.begin, shard.end))
        return rows

    return _records_of_rows(open_rows, of_row, shard.path, first_row=shard.begin)


def _read_hub(shard: Shard, of_row: OfRow) -> Iterator[Any]:
    def open_rows() -> Rows:
        rows: Rows = _open_hub(shard.path, shard.split).shard(num_shards=shard.end, index=shard.begin)
        return rows

    return _records_of_rows(open_rows, of_row, f"{shard.path} (part {shard.begin + 1} of {shard.end})", first_row=0)


READERS: dict[str, Callable[[Shard, OfRow], Iterator[Any]]] = {
    "text": _read_text,
    "python": _read_python,
    "jsonl": _read_jsonl,
    "jsonl.gz": _read_jsonl_gz,
    "table": _read_table,
    "saved": _read_saved,
    "hub": _read_hub,
}


def _open_saved(root: str, split: str, where: str) -> Any:
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


def _open_hub(name: str, split: str) -> Any:
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
