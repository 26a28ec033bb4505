"""The build of a corpus's token stores: shards are tokenized in parallel, then joined end to end,
or a task's examples packed into rows.

Inside the folder being built:

    tokenizer/      the tokenizer that the workers load; stays with the stores
    shards-2/00042/ one tokenized shard; appears whole, so a killed build redoes only the unfinished
    counts.json     how many rows there were, were left out or cut, and had keys that were not read
    rows/           the row of each document (`origins.py`)
    main/           the store of the documents that are not held out
    held_out/       the store of the documents that are; absent if there are none
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.cache import Progress
from trainer.data.examples import NO_LABEL, Examples, RowLayout
from trainer.data.origins import NO_ROW, write_origins
from trainer.data.packing import pack
from trainer.data.shards import TokenizedShard, shard_folder
from trainer.data.sources import Corpus, first_rows
from trainer.data.store import Contents, Packing, StoreWriter
from trainer.data.tail import HELD_OUT, MAIN, hold_out_tail
from trainer.data.texts import Texts
from trainer.data.tokenizer import Tokenizer
from trainer.data.workers import tokenize_shards
from trainer.errors import DataError
from trainer.files.durable import make_private, write_json

COUNTS = "counts.json"
SHARDS = "shards-2"  # raise the number when what a worker leaves there changes


def build_stores(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    task: str,
    written: Texts | Examples,
    held_out_fraction: float,
    tail_fraction: float,
    max_rows: int | None,
    workers: int,
    progress: Progress,
) -> None:
    """Fill `folder` with the stores of `corpus`, using the finished shards of an earlier build that
    was killed.

    `written`: the way in which `task` writes its texts or examples. `tail_fraction`: the share of
    its tokens that a single text has held out at its end. `max_rows`: the first rows that are used;
    None: all. `workers`: processes that tokenize; 0 = one per core that this process may use.
    DataError if the corpus is damaged, changes during the build, or holds nothing to learn.
    """
    tokenizer.save(folder / "tokenizer")
    counts: Counter[str] = Counter()
    if max_rows is not None:
        first = first_rows(corpus, max_rows, progress)
        corpus = first.corpus
        counts.update(first.counts)
    shards = make_private(folder / SHARDS)
    todo = {number: shard for number, shard in enumerate(corpus.shards) if not shard_folder(shards, number).is_dir()}
    done = corpus.size - sum(shard.size for shard in todo.values())
    what = f"tokenizing {corpus.name}"
    progress(done, corpus.size, what)
    pool = tokenize_shards(
        todo,
        tokenizer=folder / "tokenizer",
        into=shards,
        workers=workers or _usable_cores(),
        task=task,
        settings=written.settings,
    )
    for number in pool:
        done += todo[number].size
        progress(done, corpus.size, what)
    _lay_out(folder, corpus, tokenizer, written if isinstance(written, Examples) else None, held_out_fraction, counts)
    if tail_fraction:
        hold_out_tail(folder, tokenizer, tail_fraction)
    for left in folder.glob("shards*"):  # another version's too, whose build was killed
        shutil.rmtree(left)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores of the job, not of the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_held_out(hashes: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which documents are held out, bool [documents]: those whose content hash is in the
    lowest `fraction` of all hashes.

    Neither order nor workers matter, and copies of a document fall on the same side. Of two
    documents or more, at least one is held out and at least one is not: where chance leaves a side
    empty, the document nearest to the limit moves there.
    """
    if fraction == 0.0 or len(hashes) < 2:
        return np.zeros(len(hashes), dtype=bool)
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if not held_out.any():
        held_out[np.argmin(hashes)] = True
    if held_out.all():
        held_out[np.argmax(hashes)] = False
    return held_out


def _lay_out(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    examples: Examples | None,
    held_out_fraction: float,
    counts: Counter[str],
) -> None:
    paths = [shard_folder(folder / SHARDS, number) for number in range(len(corpus.shards))]
    shards = [TokenizedShard.open(path, tokenizer.vocab_size) for path in paths]
    documents = np.concatenate([shard.documents for shard in shards])
    counts = sum((shard.counts for shard in shards), counts)
    if not len(documents):
        nothing = "its documents are empty; correct the path or the field"
        if examples:
            nothing = examples.nothing(counts) if counts["read"] else "it has no rows; correct the path, or fill it"
        raise DataError(f"{corpus.where}: {corpus.name!r} holds nothing to learn: {nothing}")
    each = examples.layout.documents_each if examples else 1
    held_out = np.repeat(choose_held_out(documents["hash"][::each], held_out_fraction), each)
    parts = {False: MAIN, True: HELD_OUT} if held_out.any() else {False: MAIN}
    contents = {
        side: Contents(
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            tokenizer=tokenizer.fingerprint,
            source=corpus.fingerprint,
            text_bytes=int(documents["text_bytes"][held_out == side].sum()),
        )
        for side in parts
    }
    shard_rows = [shard.counts["read"] for shard in shards]
    firsts = np.cumsum([0, *shard_rows[:-1]])
    row_of = np.concatenate([shard.documents["row"] + first for shard, first in zip(shards, firsts, strict=True)])
    rows: dict[str, npt.NDArray[np.int64]] = {}
    if examples is None:
        _lay_end_to_end(folder, shards, held_out, parts, contents)
        rows = {name: row_of[held_out == side] for side, name in parts.items()}
    else:
        tokenized = _TokenizedDocuments(shards)
        row_or_none = np.append(row_of, NO_ROW)  # the last, which -1 takes
        for side, name in parts.items():
            chosen = np.flatnonzero(held_out[::each] == side)
            rows[name] = row_or_none[_lay_in_rows(folder / name, tokenized, chosen, examples.layout, contents[side])]
    write_origins(folder, rows, shard_rows)
    write_json(folder / COUNTS, counts)


def _lay_end_to_end(
    folder: Path,
    shards: list[TokenizedShard],
    held_out: npt.NDArray[np.bool_],
    parts: dict[bool, str],
    contents: dict[bool, Contents],
) -> None:
    with ExitStack() as stack:
        writers = {
            side: stack.enter_context(StoreWriter(folder / name, contents[side].vocab_size)) for side, name in parts.items()
        }
        for side, tokens, lengths in _runs(shards, held_out):
            writers[side].append(tokens, lengths)
        for side, writer in writers.items():
            writer.finish(contents[side])


class _TokenizedDocuments:
    """The documents of all shards, numbered consecutively."""

    def __init__(self, shards: list[TokenizedShard]) -> None:
        self._shards = shards
        self._firsts = np.cumsum([0, *(len(shard.documents) for shard in shards)])
        self._begins = [np.cumsum([0, *shard.documents["tokens"]]) for shard in shards]
        records = np.concatenate([shard.documents for shard in shards])
        self.lengths: npt.NDArray[np.int64] = records["tokens"]
        self.labels: npt.NDArray[np.int32] = records["label"]

    def read(self, document: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return a document's tokens, and which of them are to be predicted."""
        number = int(np.searchsorted(self._firsts, document, side="right")) - 1
        shard, begin = self._shards[number], int(self._begins[number][document - self._firsts[number]])
        span = slice(begin, begin + int(self.lengths[document]))
        assert shard.targets is not None
        return shard.tokens[span], shard.targets[span]


def _lay_in_rows(
    path: Path, documents: _TokenizedDocuments, chosen: npt.NDArray[np.int64], layout: RowLayout, contents: Contents
) -> npt.NDArray[np.int64]:
    """Write the chosen examples, numbered over all shards, as a store of rows. Return the numbers
    of the documents in it, int64 [documents], -1 for what fills up a row."""
    laid: list[npt.NDArray[np.int64]] = []
    rows = pack(layout.room(documents.lengths)[chosen], layout.capacity)
    targets = filler = 0
    with StoreWriter(path, contents.vocab_size, with_targets=True, with_labels=layout.labelled) as writer:
        for number, row in enumerate(rows):
            parts = layout.documents_of(chosen[row])
            for part, inside in enumerate(parts):
                is_end = number == len(rows) - 1 and part == len(parts) - 1
                # The last part has one token more, the one after the last row.
                left = layout.part_tokens - int(documents.lengths[inside].sum()) + is_end
                laid.append(np.append(inside, -1) if left else inside)
                pieces, marks = zip(*map(documents.read, inside.tolist()), strict=True)
                lengths, labels = documents.lengths[inside], documents.labels[inside]
                if left:
                    pieces = (*pieces, np.full(left, contents.end_of_document, pieces[0].dtype))
                    marks = (*marks, np.zeros(left, np.uint8))
                    lengths, labels = np.append(lengths, left), np.append(labels, np.int32(NO_LABEL))
                writer.append(np.concatenate(pieces), lengths, np.concatenate(marks), labels)
                targets += int((labels != NO_LABEL).sum()) if layout.labelled else int(sum(mark.sum() for mark in marks))
                filler += left
        packing = Packing(
            row_tokens=layout.row_tokens, parts=layout.parts, examples=len(chosen), targets=targets, filler=filler
        )
        writer.finish(contents, packing)
    return np.concatenate(laid)


def _runs(
    shards: list[TokenizedShard], held_out: npt.NDArray[np.bool_]
) -> Iterator[tuple[bool, npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Yield (held out?, tokens, lengths) for each run of consecutive documents on the same side."""
    seen = 0
    for shard in shards:
        lengths = shard.documents["tokens"]
        side = held_out[seen : seen + len(lengths)]
        seen += len(lengths)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        cuts = [0, *(np.flatnonzero(side[1:] != side[:-1]) + 1).tolist(), len(lengths)]
        for first, last in pairwise(cuts):
            if first < last:
                yield bool(side[first]), shard.tokens[ends[first] : ends[last]], lengths[first:last]
