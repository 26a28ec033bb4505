"""One tokenized shard on disk: what a worker leaves behind, whole or not at all.

tokens.bin      the tokens of the shard's documents, each ended by the end-of-document token, conversations by their template
targets.bin     of conversations: 1 for a token that is to be predicted, 0 for another; u1
documents.bin   one DOCUMENT record per document
shard.json      the SHA-256 of each; of conversations, what was left out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trainer.data.chat import Chat, Rendered
from trainer.data.sources import Shard
from trainer.data.store import token_dtype
from trainer.data.tokenizer import Tokenizer
from trainer.durable import appearing_folder, private_file, read_json, write_json
from trainer.errors import DataError

# Tokens with the end of document, the hash that decides whether the document is held out, its length in UTF-8.
DOCUMENT = np.dtype([("tokens", "<i8"), ("hash", "<u8"), ("text_bytes", "<i8")])
HASH_KEY = b"triaxis held-out documents"
Record = TypeVar("Record")
BATCH_CHARACTERS = 1 << 20  # tokenized at a time: bounds the memory of a worker


def shard_folder(shards: Path, number: int) -> Path:
    return shards / f"{number:05d}"


@dataclass(frozen=True)
class LeftOut:
    """What became of the conversations of a source that are not trained whole."""

    conversations: int = 0  # all that were read
    unanswered: int = 0  # without an answer that counts: left out
    too_long: int = 0  # of which the first answer begins beyond the last token of a sequence: left out
    truncated: int = 0
    lost_targets: int = 0  # [tokens] of the truncated ones

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def tokenize_shard(shard: Shard, tokenizer: Tokenizer, folder: Path, chat: Chat | None = None) -> None:
    """Write the shard's documents, less those without a token, to `folder`; with `chat`, its conversations."""
    if chat is None:
        _write(folder, ("tokens.bin", "documents.bin"), _encoded_texts(shard, tokenizer))
    else:
        _write(folder, ("tokens.bin", "targets.bin", "documents.bin"), _encoded_conversations(shard, tokenizer, chat))


Batch = tuple[tuple[bytes, ...], LeftOut]  # what is added to each file; and what was left out


def _write(folder: Path, names: tuple[str, ...], batches: Iterator[Batch]) -> None:
    with appearing_folder(folder) as staging:
        sums = {name: hashlib.sha256() for name in names}
        left_out = LeftOut()
        with ExitStack() as stack:
            files = {name: stack.enter_context(private_file(staging / name)) for name in names}
            for contents, more in batches:
                left_out += more
                for name, content in zip(names, contents, strict=True):
                    files[name].write(content)
                    sums[name].update(content)
        sha256 = {name: digest.hexdigest() for name, digest in sums.items()}
        write_json(staging / "shard.json", {"sha256": sha256, "left_out": asdict(left_out)})


@dataclass(frozen=True)
class TokenizedShard:
    """A shard read back: tokens [tokens], records of DOCUMENT [documents], of conversations targets [tokens]."""

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[Any]
    targets: npt.NDArray[Any] | None
    left_out: LeftOut

    @classmethod
    def open(cls, folder: Path, vocab_size: int) -> TokenizedShard:
        """Memory-map the shard; DataError when it is not what its worker wrote."""
        try:
            stated = read_json(folder / "shard.json")
            for name, digest in stated["sha256"].items():
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise ValueError(f"the SHA-256 of {name} does not match")
            targets = _mapped(folder / "targets.bin", np.dtype("u1")) if "targets.bin" in stated["sha256"] else None
            tokens, documents = (
                _mapped(folder / "tokens.bin", token_dtype(vocab_size)),
                _mapped(folder / "documents.bin", DOCUMENT),
            )
            return cls(tokens, documents, targets, LeftOut(**stated.get("left_out", {})))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: damaged: {error}; delete {folder.parent.parent} to tokenize again") from None


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if not path.stat().st_size:  # which the system refuses to map
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _encoded_texts(shard: Shard, tokenizer: Tokenizer) -> Iterator[Batch]:
    dtype = token_dtype(tokenizer.vocab_size)
    for texts in _batches(shard.documents(), len):
        tokens, documents = [], []
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if ids:
                content = text.encode()
                tokens.append(np.array([*ids, tokenizer.end_of_document], dtype).tobytes())
                documents.append((len(ids) + 1, _hash(content), len(content)))
        yield (b"".join(tokens), np.array(documents, DOCUMENT).tobytes()), LeftOut()


def _encoded_conversations(shard: Shard, tokenizer: Tokenizer, chat: Chat) -> Iterator[Batch]:
    dtype = token_dtype(tokenizer.vocab_size)
    for conversations in _batches(shard.conversations(chat.render), lambda rendered: len(rendered.text)):
        tokens, targets, documents = [], [], []
        left_out = LeftOut()
        for rendered in conversations:
            encoded = chat.encode(rendered)
            left_out += LeftOut(
                conversations=1,
                unanswered=not rendered.answers,
                too_long=bool(rendered.answers) and encoded is None,
                truncated=encoded is not None and encoded.lost > 0,
                lost_targets=encoded.lost if encoded is not None else 0,
            )
            if encoded is not None:
                content = _content_of(rendered)
                tokens.append(np.array(encoded.ids, dtype).tobytes())
                targets.append(encoded.is_target.astype("u1").tobytes())
                documents.append((len(encoded.ids), _hash(content), len(content)))
        yield (b"".join(tokens), b"".join(targets), np.array(documents, DOCUMENT).tobytes()), left_out


def _content_of(rendered: Rendered) -> bytes:
    """What was said by whom: the same conversation is held out or not with every tokenizer and length."""
    return json.dumps([[turn.role, turn.content] for turn in rendered.conversation], ensure_ascii=False).encode()


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
