"""A corpus → its token stores: shards tokenized side by side, then laid end to end.

Inside the folder being built:

    tokenizer/      what the workers load; stays with the stores
    shards/00042/   one tokenized shard; appears whole, so a killed build redoes unfinished shards only
    main/           the store of the documents that are not held out
    held_out/       the store of those that are; absent when there are none
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.cache import Progress
from trainer.data.shards import TokenizedShard, shard_folder
from trainer.data.sources import Corpus
from trainer.data.store import Contents, StoreWriter
from trainer.data.tokenizer import Tokenizer
from trainer.data.workers import tokenize_shards
from trainer.durable import make_private
from trainer.errors import DataError

MAIN = "main"
HELD_OUT = "held_out"


def build_stores(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, *, held_out_fraction: float, workers: int, progress: Progress
) -> None:
    """Fill `folder` with the stores of `corpus`, using the finished shards of an earlier build that was killed.

    `workers`: processes that tokenize; 0 = one per core this process may use. DataError when the corpus is damaged, changes
    meanwhile, or holds no token.
    """
    tokenizer.save(folder / "tokenizer")
    shards = make_private(folder / "shards")
    todo = {number: shard for number, shard in enumerate(corpus.shards) if not shard_folder(shards, number).is_dir()}
    done = corpus.size - sum(shard.size for shard in todo.values())
    what = f"tokenizing {corpus.name}"
    progress(done, corpus.size, what)
    for number in tokenize_shards(todo, tokenizer=folder / "tokenizer", into=shards, workers=workers or _usable_cores()):
        done += todo[number].size
        progress(done, corpus.size, what)
    _lay_end_to_end(folder, corpus, tokenizer, held_out_fraction)
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


def _lay_end_to_end(folder: Path, corpus: Corpus, tokenizer: Tokenizer, held_out_fraction: float) -> None:
    paths = [shard_folder(folder / "shards", number) for number in range(len(corpus.shards))]
    shards = [TokenizedShard.open(path, tokenizer.vocab_size) for path in paths]
    documents = np.concatenate([shard.documents for shard in shards])
    if not len(documents):
        raise DataError(
            f"{corpus.where}: {corpus.name!r} holds no token: its documents are empty; correct the path or the field"
        )
    held_out = choose_held_out(documents["hash"], held_out_fraction)
    parts = {False: MAIN, True: HELD_OUT} if held_out.any() else {False: MAIN}
    with ExitStack() as stack:
        writers = {side: stack.enter_context(StoreWriter(folder / name, tokenizer.vocab_size)) for side, name in parts.items()}
        for side, tokens, lengths in _runs(shards, held_out):
            writers[side].append(tokens, lengths)
        for side, writer in writers.items():
            contents = Contents(
                vocab_size=tokenizer.vocab_size,
                end_of_document=tokenizer.end_of_document,
                tokenizer=tokenizer.fingerprint,
                source=corpus.fingerprint,
                text_bytes=int(documents["text_bytes"][held_out == side].sum()),
            )
            writer.finish(contents)


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
