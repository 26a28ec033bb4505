"""One tokenized shard on disk: what a worker leaves behind, whole or not at all.

tokens.bin      the tokens of the shard's documents, each document ended by the end-of-document token
documents.bin   one DOCUMENT record per document
shard.json      the SHA-256 of both
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.sources import Shard
from trainer.data.store import token_dtype
from trainer.data.tokenizer import Tokenizer
from trainer.durable import appearing_folder, private_file, read_json, write_json
from trainer.errors import DataError

# Tokens with the end of document, the hash that decides whether the document is held out, its length in UTF-8.
DOCUMENT = np.dtype([("tokens", "<i8"), ("hash", "<u8"), ("text_bytes", "<i8")])
HASH_KEY = b"triaxis held-out documents"
BATCH_CHARACTERS = 1 << 20  # tokenized at a time: bounds the memory of a worker


def shard_folder(shards: Path, number: int) -> Path:
    return shards / f"{number:05d}"


def tokenize_shard(shard: Shard, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the shard's documents, less those without a token, to `folder`."""
    with appearing_folder(folder) as staging:
        sums = {name: hashlib.sha256() for name in ("tokens.bin", "documents.bin")}
        with private_file(staging / "tokens.bin") as tokens, private_file(staging / "documents.bin") as documents:
            for texts in _batches(shard.documents()):
                token_bytes, document_bytes = _encode(texts, tokenizer)
                tokens.write(token_bytes)
                documents.write(document_bytes)
                sums["tokens.bin"].update(token_bytes)
                sums["documents.bin"].update(document_bytes)
        write_json(staging / "shard.json", {"sha256": {name: digest.hexdigest() for name, digest in sums.items()}})


@dataclass(frozen=True)
class TokenizedShard:
    """A shard read back: tokens [tokens], records of DOCUMENT [documents]."""

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[Any]

    @classmethod
    def open(cls, folder: Path, vocab_size: int) -> TokenizedShard:
        """Memory-map the shard; DataError when it is not what its worker wrote."""
        try:
            stated = read_json(folder / "shard.json")["sha256"]
            for name, digest in stated.items():
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise ValueError(f"the SHA-256 of {name} does not match")
            return cls(_mapped(folder / "tokens.bin", token_dtype(vocab_size)), _mapped(folder / "documents.bin", DOCUMENT))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged: {error}; delete {folder.parent.parent} to tokenize again") from None


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if not path.stat().st_size:  # which the system refuses to map
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer) -> tuple[bytes, bytes]:
    """The contents for tokens.bin and documents.bin."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens, documents = [], []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if ids:
            content = text.encode()
            digest = hashlib.blake2b(content, digest_size=8, key=HASH_KEY).digest()
            tokens.append(np.array([*ids, tokenizer.end_of_document], dtype).tobytes())
            documents.append((len(ids) + 1, int.from_bytes(digest, "little"), len(content)))
    return b"".join(tokens), np.array(documents, DOCUMENT).tobytes()
