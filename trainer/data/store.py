"""Tokens on disk: a folder of raw arrays and a header, read through the page cache and checked
block by block.

    tokens.bin      every document's tokens, each document ended by the end-of-document token;
                    little-endian u2 or u4
    documents.bin   documents + 1 numbers: where each document begins, then the number of tokens;
                    little-endian i8
    targets.bin     only if not every token is learned: one u1 per token, 1 if it is to be
                    predicted, else 0
    labels.bin      only if documents have labels: the label of each, -1 for none;
                    little-endian i4
    header.json     format, dtype, counts, fingerprints, SHA-256 of each 16 MiB block of each file,
                    and of itself; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NotRequired

import numpy as np
import numpy.typing as npt
from pydantic import Field, with_config
from typing_extensions import TypedDict

from trainer.data.array_file import ArrayFile, damage
from trainer.files.decoding import CLOSED, decode
from trainer.files.durable import make_private, private_file, sync_folder, write_json
from trainer.files.reading import open_regular, read_json, require_regular, told

FORMAT = "triaxis-tokens"
VERSION = 3
BLOCK_BYTES = 16 << 20
SAMPLED_BLOCKS = 64  # 1 GiB: about a second of hashing

Verify = Literal["header", "sampled", "full"]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest dtype that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]


@dataclass(frozen=True)
class Contents:
    """The facts that a store records about itself."""

    vocab_size: Count
    end_of_document: Count
    tokenizer: str  # fingerprint
    source: str  # fingerprint
    text_bytes: Count = 0  # UTF-8 length of the documents [bytes]


@dataclass(frozen=True)
class Packing:
    """The packing of a store with targets.bin: whole examples lie in rows of equal length, so that
    no row cuts one.

    What is left of a row, or of each of its parts, is a document of end-of-document tokens, none of
    them a target. One more such token follows the last row, so that every token of a row has a next
    one.
    """

    row_tokens: Annotated[int, Field(ge=1, strict=True)]
    parts: Annotated[int, Field(ge=1, strict=True)]
    examples: Count
    targets: Count
    filler: Count  # tokens


class _Blocks(TypedDict):
    bytes: Count
    blocks: list[str]


@with_config(CLOSED)
class _Header(TypedDict):
    """The header of a store. `sha256`: the hash of all the rest."""

    format: Literal["triaxis-tokens"]
    version: Literal[3]
    dtype: Literal["<u2", "<u4"]
    tokens: Count
    documents: Count
    contents: Contents
    files: dict[Literal["tokens.bin", "documents.bin", "targets.bin", "labels.bin"], _Blocks]
    packing: NotRequired[Packing]
    sha256: str


class TokenStore:
    """A read-only store. Opening it reads only the header; the rest is read when it is asked
    for."""

    def __init__(self, path: Path, header: _Header) -> None:
        self.path = path
        self.num_tokens: int = header["tokens"]
        self.num_documents: int = header["documents"]
        self.contents = header["contents"]
        self.fingerprint: str = header["sha256"][:32]
        self.tokens = ArrayFile(path / "tokens.bin", np.dtype(header["dtype"]))
        self.documents = ArrayFile(path / "documents.bin", np.dtype("<i8"))
        self.packing = header.get("packing")
        self._targets = ArrayFile(path / "targets.bin", np.dtype("u1")) if self.packing else None
        self._reference: npt.NDArray[np.float64] | None = None
        self._labels = ArrayFile(path / "labels.bin", np.dtype("<i4")) if "labels.bin" in header["files"] else None

    @classmethod
    def open(cls, path: Path, *, verify: Verify = "header") -> TokenStore:
        """Open the store at `path`. DataError names the damaged file, and the block.

        The header (by its own hash) and the sizes of the files are always checked. "sampled" reads
        up to 64 blocks of each file, evenly spread: all of a store below 1 GiB. "full" reads
        everything, and also checks that tokens and documents fit the header.
        """
        header = _read_header(path)
        _check_sizes(path, header)
        if verify != "header":
            for name, file in header["files"].items():
                blocks = range(len(file["blocks"]))
                step = 1 if verify == "full" else max(1, -(-len(blocks) // SAMPLED_BLOCKS))
                _check_blocks(path / name, file["blocks"], blocks[::step])
        store = cls(path, header)
        if verify == "full":
            store._check_values()
        return store

    @property
    def labelled(self) -> bool:
        """Return whether documents have labels."""
        return self._labels is not None

    def slice(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return tokens [begin, end) as a copy, int64 [end - begin]."""
        return self.tokens[begin:end].astype(np.int64)

    def targets(self, begin: int, end: int) -> npt.NDArray[np.bool_]:
        """Return which of the tokens [begin, end) are to be predicted, bool [end - begin]. All are
        if the store has no targets."""
        if self._targets is None:
            return np.ones(end - begin, dtype=bool)
        return self._targets[begin:end].astype(bool)

    def labels(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the labels of the documents that begin in [begin, end), -1 for none, int64
        [documents beginning]."""
        assert self._labels is not None
        first, last = self.documents.searchsorted([begin, end], "left")
        return self._labels[first:last].astype(np.int64)

    def with_reference(self, log_probs: npt.NDArray[np.float64]) -> TokenStore:
        """Return the same store with a model's log-probabilities of its documents' targets, float64
        [documents]."""
        assert len(log_probs) == self.num_documents
        store = copy(self)
        store._reference = log_probs
        return store

    def reference(self, begin: int, end: int) -> npt.NDArray[np.float64] | None:
        """Return the log-probabilities of the documents that begin in [begin, end), float64
        [documents beginning]; None if there are none."""
        if self._reference is None:
            return None
        first, last = self.documents.searchsorted([begin, end], "left")
        return self._reference[first:last]

    def document_ends(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return where documents end in (begin, end], relative to `begin`, one past their last
        token; int64 [documents ending]."""
        first, last = self.documents.searchsorted([begin, end], "right")
        return self.documents[first:last] - begin

    def chunks(self, size_tokens: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
        """Yield all tokens in order, a few MiB at a time."""
        yield from _chunks(self.tokens, size_tokens)

    def target_chunks(self, size_tokens: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
        """Yield all tokens that are to be predicted, in order."""
        for number, chunk in enumerate(self.chunks(size_tokens)):
            yield (
                chunk if self._targets is None else chunk[self.targets(number * size_tokens, number * size_tokens + len(chunk))]
            )

    def _check_values(self) -> None:
        largest = max(int(chunk.max()) for chunk in self.chunks())
        if largest >= self.contents.vocab_size:
            raise damage(
                self.path / "tokens.bin", f"holds token {largest}, beyond the vocabulary of {self.contents.vocab_size}"
            )
        if self._targets is not None and any(int(chunk.max()) > 1 for chunk in _chunks(self._targets)):
            raise damage(self.path / "targets.bin", "holds values other than 0 and 1")
        begins = self.documents[:]
        if begins[0] != 0 or begins[-1] != self.num_tokens or bool(np.any(begins[1:] <= begins[:-1])):
            raise damage(self.path / "documents.bin", f"does not divide {self.num_tokens} tokens into documents")


def _chunks(array: ArrayFile, size: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
    for begin in range(0, len(array), size):
        yield array[begin : begin + size]


class StoreWriter:
    """A writer of one store, document by document or many at once. Nothing is a store before
    `finish`."""

    def __init__(self, path: Path, vocab_size: int, *, with_targets: bool = False, with_labels: bool = False) -> None:
        self._path = make_private(path)
        self._dtype = token_dtype(vocab_size)
        self._stack = ExitStack()
        self._tokens = BlockHasher(self._stack.enter_context(private_file(path / "tokens.bin")))
        self._documents = BlockHasher(self._stack.enter_context(private_file(path / "documents.bin")))
        self._targets = BlockHasher(self._stack.enter_context(private_file(path / "targets.bin"))) if with_targets else None
        self._labels = BlockHasher(self._stack.enter_context(private_file(path / "labels.bin"))) if with_labels else None
        self._documents.write(_bytes_of(np.zeros(1), np.dtype("<i8")))
        self.num_tokens = 0
        self.num_documents = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int64],
        targets: npt.NDArray[Any] | None = None,
        labels: npt.NDArray[Any] | None = None,
    ) -> None:
        """Add documents.

        `tokens` [sum of lengths] has them one after another, `lengths` is [documents]. With
        `with_targets`, `targets` [sum of lengths] says which tokens are to be predicted; with
        `with_labels`, `labels` [documents] has the label of each.
        """
        if self._labels is not None:
            assert labels is not None
            assert len(labels) == len(lengths)
            self._labels.write(_bytes_of(labels, np.dtype("<i4")))
        if self._targets is not None:
            assert targets is not None
            assert len(targets) == len(tokens)
            self._targets.write(_bytes_of(targets, np.dtype("u1")))
        ends = self.num_tokens + np.cumsum(lengths)
        self._tokens.write(_bytes_of(tokens, self._dtype))
        self._documents.write(_bytes_of(ends, np.dtype("<i8")))
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def finish(self, contents: Contents, packing: Packing | None = None) -> None:
        """Make the arrays durable, then the header that makes them a store."""
        self._stack.close()
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.str,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "contents": vars(contents),
            "files": {"tokens.bin": self._tokens.summary(), "documents.bin": self._documents.summary()},
        }
        if self._targets is not None:
            assert packing is not None
            header["packing"] = vars(packing)
            header["files"]["targets.bin"] = self._targets.summary()
        if self._labels is not None:
            header["files"]["labels.bin"] = self._labels.summary()
        write_json(self._path / "header.json", header | {"sha256": _header_hash(header)})
        sync_folder(self._path)


class BlockHasher:
    """A file being written, with the SHA-256 of each of its blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._blocks: list[str] = []
        self._block = hashlib.sha256()

    def write(self, view: memoryview) -> None:
        """Append bytes."""
        self._file.write(view)
        while len(view):
            room = BLOCK_BYTES - self._size % BLOCK_BYTES
            self._block.update(view[:room])
            self._size += len(view[:room])
            view = view[room:]
            if self._size % BLOCK_BYTES == 0:
                self._close_block()

    def summary(self) -> dict[str, Any]:
        if self._size % BLOCK_BYTES:
            self._close_block()
        return {"bytes": self._size, "blocks": self._blocks}

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = hashlib.sha256()


def _bytes_of(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(values, dtype).view(np.uint8).data


def _header_hash(header: dict[str, Any]) -> str:
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_header(path: Path) -> _Header:
    header_path = path / "header.json"
    try:
        header = read_json(header_path)
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise ValueError(f"format {header.get('format')!r} version {header.get('version')!r}, not {FORMAT!r} {VERSION}")
        if header.get("sha256") != _header_hash({key: value for key, value in header.items() if key != "sha256"}):
            raise ValueError("its own SHA-256 does not match")
        typed = decode(_Header, header)
        _require_sizes(typed)
    except (OSError, ValueError) as error:
        raise damage(header_path, f"damaged header: {told(error)}") from None
    return typed


def _require_sizes(header: _Header) -> None:
    """Raise ValueError unless the files have the sizes that follow from the counts."""
    tokens, documents = header["tokens"], header["documents"]
    sizes = {"tokens.bin": tokens * np.dtype(header["dtype"]).itemsize, "documents.bin": (documents + 1) * 8}
    sizes |= {"targets.bin": tokens} if "packing" in header else {}
    sizes |= {"labels.bin": documents * 4} if "labels.bin" in header["files"] else {}
    if sizes != {name: file["bytes"] for name, file in header["files"].items()} or not 0 < documents <= tokens:
        raise ValueError(f"its files do not fit its {tokens} tokens and {documents} documents")
    for name, file in header["files"].items():
        if len(file["blocks"]) != -(-file["bytes"] // BLOCK_BYTES):
            raise ValueError(f"{len(file['blocks'])} checksums for the {file['bytes']} bytes of {name}")


def _check_sizes(path: Path, header: _Header) -> None:
    for name, file in header["files"].items():
        try:
            require_regular(path / name)
            size = (path / name).stat().st_size
        except OSError as error:
            raise damage(path / name, f"cannot be read: {error.strerror}") from None
        if size != file["bytes"]:
            raise damage(path / name, f"{size} bytes, {file['bytes']} were written")


def _check_blocks(path: Path, hashes: list[str], blocks: range) -> None:
    try:
        with open_regular(path) as file:
            for block in blocks:
                file.seek(block * BLOCK_BYTES)
                if hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest() != hashes[block]:
                    raise damage(path, f"block {block} (16 MiB each, of {len(hashes)}) is damaged: SHA-256 does not match")
    except OSError as error:
        raise damage(path, f"cannot be read: {error.strerror}") from None
