"""Tokenizers round-trip any text, are the same in `transformers`, and say clearly what they lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.unit.tokenizer_folders import write_word_level
from trainer.data.backends import END_OF_DOCUMENT
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import bpe_size, load_tokenizer, make_tokenizer, train_bpe
from trainer.errors import DataError, RecipeError

CORPUS = [f"the {a} {b}\n    return {a}{b} + {i}\n" for i in range(40) for a, b in [("cat", "dog"), ("näive", "self.x")]]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [END_OF_DOCUMENT, f" a{END_OF_DOCUMENT}b ", "\r\n"]
)
BYTES = make_tokenizer("bytes")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 300)


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_bytes_are_the_bytes(text: str) -> None:
    tokenizer = BYTES
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_the_quick_way_for_bytes_is_the_backends(text: str) -> None:
    tokenizer = BYTES
    assert tokenizer._ids_are_bytes
    assert tokenizer._backend.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_bpe_round_trips_and_never_ends_a_document(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.end_of_document not in ids
    assert max(ids, default=0) < bpe.vocab_size == 300


def test_bpe_is_the_same_in_another_process(bpe: Tokenizer) -> None:
    program = (
        "import sys, json; from trainer.data.tokenizer_loading import train_bpe\n"
        "sys.stdout.write(train_bpe(json.load(sys.stdin), 300).fingerprint)"
    )
    run = subprocess.run([sys.executable, "-c", program], input=json.dumps(CORPUS), capture_output=True, text=True, check=True)
    assert run.stdout == bpe.fingerprint != make_tokenizer("bytes").fingerprint


def test_bpe_of_a_small_corpus_says_how_large_it_can_be() -> None:
    with pytest.raises(RecipeError, match=r"too small for bpe:5000: they give at most (\d+) symbols") as caught:
        train_bpe(CORPUS, 5000)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_bpe(CORPUS, largest).vocab_size == largest


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-1", "bpe:4e3", "bpe: 400", "bpe:²", "bpe:99999999999"])
def test_impossible_bpe_sizes(spec: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.tokenizer: 'bpe:.*needs a whole number"):
        bpe_size(spec)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_loads_what_we_save(tmp_path: Path, bpe: Tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer("bytes") if kind == "bytes" else bpe
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*CORPUS[:2], f"é\t{END_OF_DOCUMENT} , no clean - up . 🙂", " leading", ""]:
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.end_of_document, tokenizer.vocab_size)
    ours = load_tokenizer(str(tmp_path / "saved"))
    assert ours.fingerprint == tokenizer.fingerprint
    assert (tmp_path / "saved" / "tokenizer.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "__type": "AddedToken"}])
def test_hugging_face_folder(tmp_path: Path, eos: object) -> None:
    folder = write_word_level(
        tmp_path / "hf", {"eos_token": eos, "chat_template": "{{ x }}", "auto_map": {"AutoTokenizer": "evil.py"}}
    )
    tokenizer = make_tokenizer(str(folder))
    assert tokenizer.encode_batch(["a b a b", "a"]) == [[2, 3, 2, 3], [2]]
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (1, 4)
    tokenizer.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "{{ x }}"
    assert "auto_map" not in kept
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("a b a b") == [2, 3, 2, 3]


def test_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    tokenizer = make_tokenizer(str(tmp_path))
    assert tokenizer.encode("abb") == [2, 1]
    assert tokenizer.end_of_document == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "names no eos_token"), ({"eos_token": "<end>"}, r"\(eos_token\) '<end>' is not in its vocabulary")],
)
def test_missing_end_of_document_is_named(tmp_path: Path, config: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_tokenizer(str(write_word_level(tmp_path / "hf", config)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_folder_is_named(tmp_path: Path, name: str) -> None:
    folder = write_word_level(tmp_path / "hf", {"eos_token": "</s>"})
    (folder / name).write_text("{broken")
    with pytest.raises(DataError, match=name):
        make_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["./nothing", "/no/thing", "byte:3"])
def test_no_such_tokenizer(name: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.tokenizer: .* is neither 'bytes', 'bpe:N', a folder here nor a hub name"):
        make_tokenizer(name)


def test_folder_that_holds_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no tokenizer could be loaded from it"):
        make_tokenizer(str(tmp_path))
