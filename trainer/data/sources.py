"""Sources: what a recipe names → shards that worker processes read alone.

A `Corpus` is one source looked at from outside: its shards, its fingerprint, and what was passed over. The documents or
examples of a source are those of its shards in order, whoever reads them.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from trainer import sections
from trainer.data.digests import Digests, fingerprint_of, unreadable
from trainer.data.fault import first_line
from trainer.data.readers import DELIMITED_SUFFIXES, TABLE_SUFFIXES, LocalFile, Shard, hub_revision, open_hub, open_saved
from trainer.data.tasks import ROW_TASKS
from trainer.errors import DataError, RecipeError

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
ROW_FILES = (*JSONL_SUFFIXES, *TABLE_SUFFIXES, *DELIMITED_SUFFIXES)
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


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

    def in_rows(self, source: sections.Source, task: str) -> Corpus:
        """The same source, its rows read as the examples of a task; RecipeError when no file of it has rows."""
        format, examples = ROW_TASKS[task]
        files = [file for shard in self.shards if shard.kind in ("text", "python") for file in shard.files]
        texts = [file.name for file in files if not file.path.endswith(DELIMITED_SUFFIXES)]
        shards = [shard for shard in self.shards if shard.kind not in ("text", "python")]
        shards += [
            Shard("delimited", self.where, (file,), size=file.size, columns=tuple(source.columns))
            for file in files
            if file.path.endswith(DELIMITED_SUFFIXES)
        ]
        if not shards:
            raise RecipeError(
                f"{self.where}.path: {source.path!r} is text ({texts[0]}), which holds no {examples.noun}; data.task {task} "
                f"reads {', '.join(ROW_FILES)}, saved and hub data sets (a JSON list becomes rows by jq -c '.[]')"
            )
        notes = [f"{self.where}: text files passed over in {source.path}: {', '.join(texts)}"] if texts else []
        rows = format.of_source(source)
        return replace(
            self,
            shards=tuple(replace(shard, format=rows) for shard in shards),
            fingerprint=fingerprint_of([task, self.fingerprint, asdict(rows), *([source.columns] if source.columns else [])]),
            notes=(*self.notes, *notes),
        )


def look_at(source: sections.Source, *, where: str, digests: Digests) -> Corpus:
    """Find what `source` names and divide it into shards.

    `where` is the recipe's name of the source for messages. RecipeError when there is nothing of that name, DataError when it
    holds no document or cannot be read.
    """
    if source.path == sections.STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"]
        return _corpus_of_files(source, where, root, files, digests, text_kind="python")
    path = Path(source.path).expanduser()
    if source.target_path is not None:
        return _corpus_of_lines(source, where, [path, Path(source.target_path).expanduser()], digests)
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
        shards=tuple(_divide(files, text_kind, where, source.text_field)),
        fingerprint=fingerprint_of(
            {"kind": text_kind, "field": source.text_field, "files": [[file.name, file.size, file.digest] for file in files]}
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


def _corpus_of_lines(source: sections.Source, where: str, paths: list[Path], digests: Digests) -> Corpus:
    """Two text files whose lines belong together; one process reads both."""
    for path, key in zip(paths, ("path", "target_path"), strict=True):
        if not path.is_file():
            raise RecipeError(f"{where}.{key}: no such file: {getattr(source, key)!r} (from {Path.cwd()}); correct the path")
    absolute = [path.absolute() for path in paths]
    stamped = digests.of([str(path) for path in absolute])
    files = tuple(
        LocalFile(str(path), path.name, stamp, digest) for path, (stamp, digest) in zip(absolute, stamped, strict=True)
    )
    shard = Shard("lines", where, files, size=max(1, sum(file.size for file in files)))
    facts = {"kind": "lines", "files": [[file.name, file.size, file.digest] for file in files]}
    return Corpus(f"{source.path} → {source.target_path}", where, (shard,), fingerprint_of(facts))


def _corpus_of_saved(source: sections.Source, where: str, root: Path, digests: Digests) -> Corpus:
    paths = [str(path) for path in _walk(root)]
    files = tuple(
        LocalFile(path, Path(path).relative_to(root).as_posix(), stamp, digest)
        for path, (stamp, digest) in zip(paths, digests.of(paths), strict=True)
    )
    rows = len(open_saved(str(root), source.split, where))
    if not rows:
        raise DataError(f"{where}: {source.path!r} holds no document (0 rows in split {source.split!r}); correct the path")
    size = sum(file.size for file in files)
    parts = min(rows, max(1, min(MAX_SHARDS, size // MIN_SHARD_BYTES)))
    cuts = [rows * part // parts for part in range(parts + 1)]
    shards = [
        Shard("saved", where, files, begin, end, max(1, size // parts), str(root), source.text_field, source.split)
        for begin, end in pairwise(cuts)
    ]
    facts = [[file.name, file.size, file.digest] for file in files]
    fingerprint = fingerprint_of({"kind": "saved", "field": source.text_field, "split": source.split, "files": facts})
    return Corpus(source.path, where, tuple(shards), fingerprint)


def _corpus_of_hub(source: sections.Source, where: str) -> Corpus:
    """A hub data set; its revision is part of the fingerprint, so that a changed data set is tokenized anew."""
    try:
        revision = hub_revision(source.path)
        parts = open_hub(source.path, source.split).num_shards
    except Exception as error:  # datasets, its hub client and its HTTP client each raise kinds of their own
        raise RecipeError(
            f"{where}.path: no file or folder {source.path!r} here, and not to be had from the hub: {first_line(error)}; "
            "correct the path, or data.sources[].split, or bring the data here as a folder"
        ) from None
    shards = [
        Shard("hub", where, begin=part, end=parts, path=source.path, field=source.text_field, split=source.split)
        for part in range(parts)
    ]
    facts = {"kind": "hub", "path": source.path, "revision": revision, "field": source.text_field, "split": source.split}
    return Corpus(source.path, where, tuple(shards), fingerprint_of(facts))
