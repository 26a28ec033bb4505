"""The sources that a recipe names, divided into shards that worker processes read alone.

A `Corpus` is one source looked at from outside: its shards, its fingerprint, and what was passed
over. The documents or examples of a source are those of its shards in order, whoever reads them.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from trainer import schema
from trainer.data.cache import Progress
from trainer.data.digests import Digests, fingerprint_of, unreadable
from trainer.data.fault import first_line
from trainer.data.files import packing_of, unpacked_name
from trainer.data.kinds import JSONL_SUFFIXES, MAYBE_ROWS, ROW_SUFFIXES, TEXT, Kind, Wanted, is_known, kind_of_file, suffix_of
from trainer.data.readers import FETCHED, LocalFile, Shard, hub_revision, open_hub, open_saved
from trainer.data.tasks import ROW_TASKS
from trainer.errors import DataError, RecipeError

MIN_SHARD_BYTES = 2 << 20  # a few seconds of one core: a killed build loses at most that per worker
MAX_SHARDS = 1024  # per source, so that a huge source does not become a huge folder

# In the counts of a source.
USED, LEFT_OUT = "rows used", "rows left out"

TEXT_KINDS = ("text", "python")
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class Corpus:
    """A source, looked at but not read: enough to know whether it was tokenized before, and to
    divide the work."""

    name: str
    where: str
    shards: tuple[Shard, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def documents(self) -> Iterator[str]:
        """Yield all texts in order."""
        for shard in self.shards:
            yield from shard.documents()


@dataclass(frozen=True)
class FirstRows:
    """A corpus of the first rows of a source. `left_out`: how many rows follow; None: some, which
    nobody fetched to count them."""

    corpus: Corpus
    used: int
    left_out: int | None

    @property
    def counts(self) -> dict[str, int]:
        """The counts of which `rows_left_out` tells; {} if nothing is left out."""
        if self.left_out is None:
            return {USED: self.used}
        return {USED: self.used, LEFT_OUT: self.left_out} if self.left_out else {}


def rows_left_out(counts: Mapping[str, int]) -> str | None:
    """Return a line about the rows beyond the first that are used, or None if there are none."""
    if USED not in counts:
        return None
    used, rest = counts[USED], counts.get(LEFT_OUT)
    of_all = "" if rest is None else f" of {used + rest:,}"
    left = "those after them are not fetched" if rest is None else f"{rest:,} are left out"
    return f"data.max_rows: the first {used:,}{of_all} rows are used, {left}"


def first_rows(corpus: Corpus, most: int, progress: Progress) -> FirstRows:
    """Return the corpus of the first rows, at most `most`, in the order of its documents."""
    shards: list[Shard] = []
    room, left_out, done = most, 0, 0
    for shard in corpus.shards:
        progress(done, corpus.size, f"counting the rows of {corpus.name}")
        fetched = shard.kind in FETCHED
        rows = shard.num_rows(room + 1 if fetched else None)
        if room:
            shards.append(shard if rows <= room else replace(shard, limit=room))
        left_out += max(0, rows - room)
        room = max(0, room - rows)
        if fetched and left_out:
            return FirstRows(replace(corpus, shards=tuple(shards)), most, None)
        done += shard.size
    progress(done, corpus.size, f"counting the rows of {corpus.name}")
    return FirstRows(replace(corpus, shards=tuple(shards)), most, left_out)


def look_at(source: schema.Source, *, where: str, digests: Digests, task: str = "pretrain") -> Corpus:
    """Find what `source` names and divide it into shards.

    `where` is the recipe's name of the source, for messages. RecipeError if nothing of that name
    exists, or nothing that `task` can learn from. DataError if it holds no document or cannot be
    read.
    """
    if task not in ROW_TASKS:
        return _found(source, where, digests, in_rows=False)
    return _in_rows(_found(source, where, digests, in_rows=True), source, task)


def _found(source: schema.Source, where: str, digests: Digests, *, in_rows: bool) -> Corpus:
    if source.path == schema.STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"]
        kept, notes = _without_excluded(files, root, source, where)
        corpus = _corpus_of_files(source, where, root, kept, digests, python=True)
        return replace(corpus, notes=(*notes, *corpus.notes))
    path = Path(source.path)
    if source.target_path is not None:
        return _corpus_of_lines(source, where, [path, Path(source.target_path)], digests)
    if path.is_file():
        return _corpus_of_files(source, where, path.absolute().parent, [path.absolute()], digests, in_rows=in_rows, alone=True)
    if path.is_dir():
        return _corpus_of_folder(source, where, path.absolute(), digests, in_rows=in_rows)
    if path.exists():
        raise RecipeError(f"{where}.path: {source.path!r} is neither a file nor a folder (a pipe, a device): give one")
    if _looks_local(source.path):
        raise RecipeError(f"{where}.path: no such file or folder: {source.path!r} (from {Path.cwd()}); correct the path")
    if not HUB_NAME.match(source.path):
        raise RecipeError(
            f"{where}.path: {source.path!r} is neither a file or folder here nor a hub name (owner/name); correct the path"
        )
    return _corpus_of_hub(source, where)


def _in_rows(corpus: Corpus, source: schema.Source, task: str) -> Corpus:
    """Return the same source with its rows read as the examples of a task."""
    format, examples = ROW_TASKS[task]
    texts = [file.name for shard in corpus.shards if shard.kind in TEXT_KINDS for file in shard.files]
    shards = [shard for shard in corpus.shards if shard.kind not in TEXT_KINDS]
    if not shards:
        raise RecipeError(
            f"{corpus.where}.path: {source.path!r} is text ({texts[0]}), which holds no {examples.noun}; data.task {task} "
            f"reads {', '.join(ROW_SUFFIXES)}, also .gz and .zst, saved and hub data sets"
        )
    shards.sort(key=lambda shard: shard.kind == "delimited")  # these come last
    notes = [f"{corpus.where}: text files passed over in {source.path}: {', '.join(texts)}"] if texts else []
    rows = format.of_source(source)
    return replace(
        corpus,
        shards=tuple(replace(shard, format=rows) for shard in shards),
        fingerprint=fingerprint_of([task, corpus.fingerprint, asdict(rows), *([source.columns] if source.columns else [])]),
        notes=(*corpus.notes, *notes),
    )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or is_known(path) or packing_of(path) != ""


def _corpus_of_folder(source: schema.Source, where: str, root: Path, digests: Digests, *, in_rows: bool) -> Corpus:
    if not os.access(root, os.R_OK | os.X_OK):  # else the message would name the first file in it
        raise unreadable(root, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        if source.exclude:
            raise RecipeError(f"{where}.exclude leaves out files, and {source.path!r} is a saved data set: remove it")
        return _corpus_of_saved(source, where, root, digests)
    found, notes = _without_excluded(list(_walk(root)), root, source, where)
    known = [path for path in found if is_known(path.name)]
    corpus = _corpus_of_files(source, where, root, known, digests, in_rows=in_rows)
    if skipped := Counter(path.suffix or path.name for path in set(found) - set(known)):
        kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(skipped.items()))
        notes.append(f"{where}: files of unknown kind passed over in {source.path}: {kinds}")
    return replace(corpus, notes=(*notes, *corpus.notes))


def _without_excluded(paths: list[Path], root: Path, source: schema.Source, where: str) -> tuple[list[Path], list[str]]:
    """Return the files that no pattern of `exclude` matches, and remarks: how many it leaves out,
    and which patterns match nothing."""
    names = {path: path.relative_to(root).as_posix() for path in paths}
    matched = {pattern: {path for path in paths if fnmatch.fnmatchcase(names[path], pattern)} for pattern in source.exclude}
    excluded = set().union(*matched.values())
    notes = [f"{where}.exclude leaves out {len(excluded):,} of {len(paths):,} files of {source.path}"] if excluded else []
    if idle := [pattern for pattern, found in matched.items() if not found]:
        notes.append(f"{where}.exclude: no file of {source.path} matches {', '.join(map(repr, idle))}")
    return [path for path in paths if path not in excluded], notes


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Return the files below root, sorted by relative path, without hidden ones and folders named
    in `skip`."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    found = []
    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _corpus_of_files(
    source: schema.Source,
    where: str,
    root: Path,
    paths: list[Path],
    digests: Digests,
    *,
    in_rows: bool = False,
    alone: bool = False,
    python: bool = False,
) -> Corpus:
    """Return the corpus of some files. `alone`: the source names this file. `python`: all are
    Python sources."""
    stamped = digests.of([str(path) for path in paths])
    files = [
        LocalFile(str(path), path.relative_to(root).as_posix(), stamp, digest)
        for path, (stamp, digest) in zip(paths, stamped, strict=True)
    ]
    if not any(file.size for file in files):
        raise DataError(f"{where}: {source.path!r} holds no document ({len(files)} files, 0 bytes of text); correct the path")
    field = None if in_rows else source.text_field
    wanted = Wanted(field, source.columns, must=source.field is not None, alone=alone)
    kinds = [Kind("python") if python else kind_of_file(file.path, wanted) for file in files]
    facts = [
        [file.name, file.size, file.digest]
        + ([] if kind.is_plain(file.name, in_rows=in_rows) else [kind.reader, kind.delimiter])
        for file, kind in zip(files, kinds, strict=True)
    ]
    columns = [] if in_rows or not any(kind.reader == "delimited" for kind in kinds) else source.columns
    return Corpus(
        name=source.path,
        where=where,
        shards=tuple(_divide(files, kinds, where, source)),
        fingerprint=fingerprint_of(
            {
                "kind": "python" if python else "text",
                "field": source.text_field,
                "files": facts,
                **({"columns": columns} if columns else {}),
            }
        ),
        notes=tuple(_remarks(files, kinds, where, source, in_rows=in_rows)),
    )


def _remarks(files: list[LocalFile], kinds: list[Kind], where: str, source: schema.Source, *, in_rows: bool) -> Iterator[str]:
    """Yield remarks on how files are read whose names do not tell it."""
    maybe_rows = [kind for file, kind in zip(files, kinds, strict=True) if suffix_of(file.path) in MAYBE_ROWS]
    texts = sum(kind == TEXT for kind in maybe_rows)
    if maybe_rows and not in_rows:
        as_texts = f", {texts:,} as one text each, whose rows have no such field (data.sources[].field names another)"
        yield (
            f"{where}: of the {', '.join(MAYBE_ROWS)} files of {source.path} {len(maybe_rows) - texts:,} are read as rows by "
            f"the field {source.text_field!r}" + (as_texts if texts else "")
        )
    for file, kind in zip(files, kinds, strict=True):
        if kind.reader == "delimited" and not kind.is_plain(unpacked_name(file.name), in_rows=True):
            yield f"{where}: {file.name}: its values are divided by {kind.delimiter!r}"
        elif suffix_of(file.path) in JSONL_SUFFIXES and kind.reader == "json":
            yield f"{where}: {file.name}: it is one JSON list, not JSON lines, and is read as that"


def _divide(files: list[LocalFile], kinds: list[Kind], where: str, source: schema.Source) -> Iterator[Shard]:
    """Yield shards of about equal size: small text files together, long JSON-lines files in ranges,
    other files one by one."""
    shard_bytes = max(MIN_SHARD_BYTES, sum(file.size for file in files) // MAX_SHARDS)
    gathered: list[LocalFile] = []
    gathered_bytes = 0
    text_kind = "python" if any(kind.reader == "python" for kind in kinds) else "text"

    def gathered_shard() -> Iterator[Shard]:
        nonlocal gathered_bytes
        if gathered:
            yield Shard(text_kind, where, tuple(gathered), size=gathered_bytes)
        gathered.clear()
        gathered_bytes = 0

    for file, kind in zip(files, kinds, strict=True):
        if kind.reader in TEXT_KINDS:
            gathered.append(file)
            gathered_bytes += file.size
            if gathered_bytes >= shard_bytes:
                yield from gathered_shard()
            continue
        yield from gathered_shard()
        whole = Shard(kind.reader, where, (file,), size=file.size, field=source.text_field)
        if kind.reader == "delimited":
            yield replace(whole, columns=tuple(source.columns), delimiter=kind.delimiter)
        elif kind.reader == "jsonl" and not packing_of(file.path):
            for begin in range(0, file.size, shard_bytes):
                end = min(begin + shard_bytes, file.size)
                yield replace(whole, begin=begin, end=end, size=end - begin)
        else:
            yield whole
    yield from gathered_shard()


def _corpus_of_lines(source: schema.Source, where: str, paths: list[Path], digests: Digests) -> Corpus:
    """Return the corpus of two text files whose lines belong together; one process reads both."""
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


def _corpus_of_saved(source: schema.Source, where: str, root: Path, digests: Digests) -> Corpus:
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


def _corpus_of_hub(source: schema.Source, where: str) -> Corpus:
    """Return the corpus of a hub data set. Its revision is part of the fingerprint, so that a
    changed one is tokenized anew."""
    try:
        revision = hub_revision(source.path)
        parts = open_hub(source.path, source.split).num_shards
    except Exception as error:
        # datasets, its hub client and its HTTP client each raise kinds of their own.
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
