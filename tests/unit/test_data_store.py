"""A token store gives back what was written, and no damage passes: sizes and header always, every bit on "full"."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data import store as store_module
from trainer.data.store import VERSION, Contents, StoreWriter, TokenStore, token_dtype
from trainer.errors import DataError

LENGTHS = np.array([3, 1, 6, 2], np.int64)
TOKENS = np.arange(12)


def write(path: Path, *, vocab_size: int = 300, tokens: np.ndarray = TOKENS, lengths: np.ndarray = LENGTHS) -> Path:
    with StoreWriter(path, vocab_size) as writer:
        writer.append(tokens[:4], lengths[:2])
        writer.append(tokens[4:], lengths[2:])
        writer.finish(Contents(vocab_size, end_of_document=0, tokenizer="t", source="s", text_bytes=9))
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of blocks of 7 bytes, so that a small one has several."""
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 7)
    return write(tmp_path / "fingerprint" / "main")


@pytest.mark.parametrize("vocab_size", [300, 1 << 16, (1 << 16) + 1])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    store = TokenStore.open(write(tmp_path / "main", vocab_size=vocab_size), verify="full")
    assert store.tokens.dtype.str == token_dtype(vocab_size).str == ("<u2" if vocab_size <= 65536 else "<u4")
    assert np.array_equal(store.tokens[:], TOKENS)
    assert (store.num_tokens, store.num_documents, store.contents.text_bytes) == (12, 4, 9)
    assert store.documents[:].tolist() == [0, 3, 4, 10, 12]
    assert store.slice(3, 6).tolist() == [3, 4, 5]
    assert store.document_ends(3, 10).tolist() == [1, 7]
    assert store.document_ends(4, 9).tolist() == []


def test_files_are_private(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_same_content_same_fingerprint(path: Path, tmp_path: Path) -> None:
    fingerprint = TokenStore.open(path).fingerprint
    assert TokenStore.open(write(tmp_path / "again")).fingerprint == fingerprint
    assert TokenStore.open(write(tmp_path / "other", tokens=TOKENS + 1)).fingerprint != fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_every_flipped_bit_is_found(path: Path, name: str) -> None:
    whole = (path / name).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (path / name).write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{path / name}: block {position // 7} \(16 MiB each, of \d+\) is damaged"
        ) as caught:
            TokenStore.open(path, verify="full")
        assert caught.value.exit_code == 65
        with pytest.raises(DataError):
            TokenStore.open(path, verify="sampled")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("change", [-1, -2, +1])
def test_another_size_is_always_found(path: Path, name: str, change: int) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(
        DataError, match=rf"{name}: {len(content) + change} bytes, {len(content)} were written; delete {path.parent}"
    ):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "header.json"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(DataError, match=name):
        TokenStore.open(path)


def test_every_damaged_header_is_found(path: Path) -> None:
    header = path / "header.json"
    whole = header.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        header.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(whole)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DataError, match=r"header.json: damaged header"):
                TokenStore.open(path)


def test_another_version_is_refused(path: Path) -> None:
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps(header | {"version": VERSION + 1}))
    with pytest.raises(DataError, match=rf"format 'triaxis-tokens' version {VERSION + 1}, not 'triaxis-tokens' {VERSION}"):
        TokenStore.open(path)


def test_values_that_do_not_fit_are_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds token 11, beyond the vocabulary of 10"):
        TokenStore.open(write(tmp_path / "a", vocab_size=10), verify="full")
    with pytest.raises(DataError, match="does not divide 12 tokens into documents"):
        TokenStore.open(write(tmp_path / "b", lengths=np.array([3, 1, 0, 8])), verify="full")


def test_sampling_reads_few_blocks_of_a_large_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SAMPLED_BLOCKS", 2)
    content = bytearray((path / "tokens.bin").read_bytes())  # 24 bytes: blocks 0 to 3, of which 0 and 2 are read
    content[8] ^= 1
    (path / "tokens.bin").write_bytes(content)
    TokenStore.open(path, verify="sampled")
    content[15] ^= 1
    (path / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match="block 2"):
        TokenStore.open(path, verify="sampled")


def test_nothing_unfinished_is_a_store(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "main", 300) as writer:
        writer.append(TOKENS, LENGTHS)
    with pytest.raises(DataError, match=r"header.json: damaged header: .*No such file"):
        TokenStore.open(tmp_path / "main")
