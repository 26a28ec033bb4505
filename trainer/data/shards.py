"""A tokenized shard on disk, which a worker leaves behind complete or not at all.

tokens.bin      the tokens of the documents: texts with the tokens around them, or examples
targets.bin     of examples: u1, 1 for a token that is to be predicted, 0 for another
documents.bin   one DOCUMENT record per document
shard.json      the SHA-256 of each; counts: of rows, of their unread keys, of what became of them
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from typing_extensions import TypedDict

from trainer.data.array_file import ArrayFile, damage
from trainer.data.examples import NO_LABEL, Examples
from trainer.data.readers import Shard
from trainer.data.store import token_dtype
from trainer.data.texts import Texts
from trainer.data.tokenizer import Tokenizer
from trainer.files.decoding import read_as
from trainer.files.durable import appearing_folder, private_file, write_json
from trainer.files.reading import open_regular, told

# The number of tokens, those around a text included; the hash that decides whether the document is
# held out; the length in UTF-8 (an example's first document has that of all of them); the label;
# the number of its row in the shard.
DOCUMENT = np.dtype([("tokens", "<i8"), ("hash", "<u8"), ("text_bytes", "<i8"), ("label", "<i4"), ("row", "<i8")])
HASH_KEY = b"triaxis held-out documents"
Record = TypeVar("Record")
BATCH_CHARACTERS = 1 << 20  # tokenized at a time, which bounds the memory of a worker


def shard_folder(shards: Path, number: int) -> Path:
    return shards / f"{number:05d}"


def tokenize_shard(shard: Shard, tokenizer: Tokenizer, folder: Path, written: Texts | Examples) -> None:
    """Write the shard's documents, except those without a token, to `folder`. `written`: the writer
    of its texts or examples."""
    if isinstance(written, Texts):
        _write(folder, ("tokens.bin", "documents.bin"), _encoded_texts(shard, tokenizer, written))
    else:
        _write(folder, ("tokens.bin", "targets.bin", "documents.bin"), _encoded_examples(shard, tokenizer, written))


# The additions to each file; the counts of what became of the examples.
Batch = tuple[tuple[bytes, ...], Counter[str]]


def _write(folder: Path, names: tuple[str, ...], batches: Iterator[Batch]) -> None:
    with appearing_folder(folder) as staging:
        sums = {name: hashlib.sha256() for name in names}
        counts: Counter[str] = Counter()
        with ExitStack() as stack:
            files = {name: stack.enter_context(private_file(staging / name)) for name in names}
            for contents, more in batches:
                counts.update(more)
                for name, content in zip(names, contents, strict=True):
                    files[name].write(content)
                    sums[name].update(content)
        sha256 = {name: digest.hexdigest() for name, digest in sums.items()}
        write_json(staging / "shard.json", {"sha256": sha256, "counts": counts})


class _Stated(TypedDict):
    sha256: dict[Literal["tokens.bin", "documents.bin", "targets.bin"], str]
    counts: dict[str, Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class TokenizedShard:
    """A shard read back: tokens [tokens], records of DOCUMENT [documents] and, for examples,
    targets [tokens]."""

    tokens: ArrayFile
    documents: npt.NDArray[Any]
    targets: ArrayFile | None
    counts: Counter[str]

    @classmethod
    def open(cls, folder: Path, vocab_size: int) -> TokenizedShard:
        """Open the shard. DataError if it is not what its worker wrote."""
        try:
            stated = read_as(_Stated, folder / "shard.json")
            for name, digest in stated["sha256"].items():
                with open_regular(folder / name) as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise ValueError(f"the SHA-256 of {name} does not match")
            targets = ArrayFile(folder / "targets.bin", np.dtype("u1")) if "targets.bin" in stated["sha256"] else None
            tokens = ArrayFile(folder / "tokens.bin", token_dtype(vocab_size))
            return cls(tokens, ArrayFile(folder / "documents.bin", DOCUMENT)[:], targets, Counter(stated["counts"]))
        except (OSError, ValueError) as error:
            raise damage(folder, f"damaged: {told(error)}") from None


def _encoded_texts(shard: Shard, tokenizer: Tokenizer, written: Texts) -> Iterator[Batch]:
    dtype = token_dtype(tokenizer.vocab_size)
    unread: Counter[str] = Counter()
    first = 0
    for texts in _batches(shard.documents(unread), len):
        tokens, documents = [], []
        for row, (text, ids) in enumerate(zip(texts, written.documents(tokenizer, texts), strict=True), first):
            if ids:
                content = text.encode()
                tokens.append(np.array(ids, dtype).tobytes())
                documents.append((len(ids), _hash(content), len(content), NO_LABEL, row))
        first += len(texts)
        counts = Counter(unread)
        counts.update(read=len(texts), empty=len(texts) - len(documents))
        unread.clear()
        yield (b"".join(tokens), np.array(documents, DOCUMENT).tobytes()), counts


def _encoded_examples(shard: Shard, tokenizer: Tokenizer, examples: Examples) -> Iterator[Batch]:
    dtype = token_dtype(tokenizer.vocab_size)
    unread: Counter[str] = Counter()
    first = 0
    for batch in _batches(shard.examples(examples.tokenize, unread), lambda tokenized: len(tokenized.content)):
        tokens, targets, documents = [], [], []
        counts = Counter(unread)
        unread.clear()
        for row, tokenized in enumerate(batch, first):
            counts.update(tokenized.counts)
            digest, text_bytes = _hash(tokenized.content), len(tokenized.content)
            for document in tokenized.documents:
                tokens.append(np.array(document.ids, dtype).tobytes())
                targets.append(document.is_target.astype("u1").tobytes())
                documents.append((len(document.ids), digest, text_bytes, document.label, row))
                text_bytes = 0
        first += len(batch)
        yield (b"".join(tokens), b"".join(targets), np.array(documents, DOCUMENT).tobytes()), counts


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=HASH_KEY).digest(), "little")


def _batches(records: Iterator[Record], characters: Callable[[Record], int]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    gathered = 0
    for record in records:
        batch.append(record)
        gathered += characters(record)
        if gathered >= BATCH_CHARACTERS:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch
