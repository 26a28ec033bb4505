"""A corpus → its token stores: shards tokenized side by side, then laid end to end, or conversations in rows.

Inside the folder being built:

    tokenizer/      what the workers load; stays with the stores
    shards/00042/   one tokenized shard; appears whole, so a killed build redoes unfinished shards only
    left_out.json   of conversations: how many were left out or cut
    main/           the store of the documents that are not held out
    held_out/       the store of those that are; absent when there are none
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.cache import Progress
from trainer.data.chat import Chat
from trainer.data.packing import pack
from trainer.data.shards import LeftOut, TokenizedShard, shard_folder
from trainer.data.sources import Corpus
from trainer.data.store import Contents, Packing, StoreWriter
from trainer.data.tokenizer import Tokenizer
from trainer.data.workers import tokenize_shards
from trainer.durable import make_private, write_json
from trainer.errors import DataError

MAIN = "main"
HELD_OUT = "held_out"
LEFT_OUT = "left_out.json"


def build_stores(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    chat: Chat | None = None,
    held_out_fraction: float,
    workers: int,
    progress: Progress,
) -> None:
    """Fill `folder` with the stores of `corpus`, using the finished shards of an earlier build that was killed.

    `chat`: its rows are conversations. `workers`: processes that tokenize; 0 = one per core this process may use. DataError
    when the corpus is damaged, changes meanwhile, or holds no token.
    """
    tokenizer.save(folder / "tokenizer")
    shards = make_private(folder / "shards")
    todo = {number: shard for number, shard in enumerate(corpus.shards) if not shard_folder(shards, number).is_dir()}
    done = corpus.size - sum(shard.size for shard in todo.values())
    what = f"tokenizing {corpus.name}"
    progress(done, corpus.size, what)
    crew = tokenize_shards(
        todo,
        tokenizer=folder / "tokenizer",
        into=shards,
        workers=workers or _usable_cores(),
        chat=chat.settings if chat else None,
    )
    for number in crew:
        done += todo[number].size
        progress(done, corpus.size, what)
    _lay_out(folder, corpus, tokenizer, chat, held_out_fraction)
    shutil.rmtree(shards)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what the job was given, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_held_out(hashes: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Which documents are held out: those whose content hash is in the lowest `fraction` of all hashes, bool [documents].

    Neither order nor workers matter, and copies of a document fall on the same side. Of two documents or more, at least one
    is held out and at least one is not: where chance leaves a side empty, the document nearest to the limit moves there.
    """
    if fraction == 0.0 or len(hashes) < 2:
        return np.zeros(len(hashes), dtype=bool)
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if not held_out.any():
        held_out[np.argmin(hashes)] = True
    if held_out.all():
        held_out[np.argmax(hashes)] = False
    return held_out


def _lay_out(folder: Path, corpus: Corpus, tokenizer: Tokenizer, chat: Chat | None, held_out_fraction: float) -> None:
    paths = [shard_folder(folder / "shards", number) for number in range(len(corpus.shards))]
    shards = [TokenizedShard.open(path, tokenizer.vocab_size) for path in paths]
    documents = np.concatenate([shard.documents for shard in shards])
    left_out = sum((shard.left_out for shard in shards), LeftOut())
    if not len(documents):
        raise DataError(_nothing(corpus) if chat is None else _no_conversation(corpus, left_out))
    held_out = choose_held_out(documents["hash"], held_out_fraction)
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
    if chat is None:
        _lay_end_to_end(folder, shards, held_out, parts, contents)
        return
    for side, name in parts.items():
        _lay_in_rows(folder / name, shards, np.flatnonzero(held_out == side), chat.seq_len, contents[side])
    write_json(folder / LEFT_OUT, asdict(left_out))


def _nothing(corpus: Corpus) -> str:
    return f"{corpus.where}: {corpus.name!r} holds no token: its documents are empty; correct the path or the field"


def _no_conversation(corpus: Corpus, left_out: LeftOut) -> str:
    return (
        f"{corpus.where}: {corpus.name!r} holds nothing to learn: of its {left_out.conversations} conversations "
        f"{left_out.unanswered} have no answer, and of {left_out.too_long} the first answer begins beyond data.seq_len; raise "
        "data.seq_len, or correct the path or the fields"
    )


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


def _lay_in_rows(
    path: Path, shards: list[TokenizedShard], chosen: npt.NDArray[np.int64], seq_len: int, contents: Contents
) -> None:
    """The chosen documents, counted over all shards, as a store of rows of `seq_len` tokens."""
    lengths = np.concatenate([shard.documents["tokens"] for shard in shards])
    firsts = np.cumsum([0, *(len(shard.documents) for shard in shards)])
    begins = [np.cumsum([0, *shard.documents["tokens"]]) for shard in shards]
    end = contents.end_of_document
    targets = filler = 0
    rows = pack(lengths[chosen], seq_len)
    with StoreWriter(path, contents.vocab_size, with_targets=True) as writer:
        for number, row in enumerate(rows):
            documents = chosen[row]
            left = seq_len - int(lengths[documents].sum()) + (number == len(rows) - 1)  # and the one after the last row
            pieces, marks = [], []
            for document in documents.tolist():
                shard = int(np.searchsorted(firsts, document, side="right")) - 1
                begin = int(begins[shard][document - firsts[shard]])
                span = slice(begin, begin + int(lengths[document]))
                pieces.append(shards[shard].tokens[span])
                marks.append(_marks(shards[shard])[span])
            row_lengths = lengths[documents].astype(np.int64)
            row_lengths[-1] += left
            writer.append(
                np.concatenate([*pieces, np.full(left, end, pieces[0].dtype)]),
                row_lengths,
                np.concatenate([*marks, np.zeros(left, np.uint8)]),
            )
            targets += int(sum(mark.sum() for mark in marks))
            filler += left
        writer.finish(contents, Packing(row_tokens=seq_len, targets=targets, filler=filler))


def _marks(shard: TokenizedShard) -> npt.NDArray[Any]:
    assert shard.targets is not None
    return shard.targets


def _runs(
    shards: list[TokenizedShard], held_out: npt.NDArray[np.bool_]
) -> Iterator[tuple[bool, npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Documents that follow one another on the same side: (held out?, their tokens, their lengths)."""
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
