"""How a text becomes a document: what begins it, and what the special tokens are that it spells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from tests.unit.tokenizer_folders import begins, byte_level, chat, put, word_piece
from trainer.data import prepare
from trainer.data.texts import Texts
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import RecipeError
from trainer.recipe import load
from trainer.schema import Data

RENDERED = "<|im_start|>user\nhi<|im_end|>\n"


def source(folder: Path, made: Any) -> Path:
    folder.mkdir()
    made(folder)
    return folder


def prepared(tokenizer: Path | str, folder: Path, **keys: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a cat", RENDERED, "")))
    sources = [{"path": str(folder / "texts.jsonl")}]
    data = Data.model_validate({"sources": sources, "tokenizer": str(tokenizer), "seq_len": 2, "eval_fraction": 0.0, **keys})
    return prepare(data, seed=0, cache_dir=folder / "cache", build=True, progress=lambda *told: None)


def documents(found: Any) -> list[list[int]]:
    """Through the processes that tokenize, as they lie on the disk."""
    (store,) = found.train
    tokens = np.fromfile(store.path / "tokens.bin", f"u{2 if store.contents.vocab_size < 2**16 else 4}").tolist()
    end, whole, document = found.tokenizer.end_of_document, [], []
    for token in tokens:
        document.append(token)
        if token == end and len(document) > 1:
            whole.append(document)
            document = []
    return whole


def test_documents_begin_as_the_tokenizer_says_unless_the_recipe_does(tmp_path: Path) -> None:
    folder = source(tmp_path / "begins", begins)
    tokenizer = load_tokenizer(str(folder))
    bos, end, (cat, rendered) = tokenizer.bos, tokenizer.end_of_document, tokenizer.encode_batch(["a cat", RENDERED])
    for keys, opening in [({}, [bos]), ({"bos": True}, [bos]), ({"bos": False}, [])]:
        found = prepared(folder, tmp_path / "data", **keys)
        assert documents(found) == [[*opening, *cat, end], [*opening, *rendered, end]]
        assert found.notes[0].startswith(f"data: a document is {'<s> + ' if opening else ''}its text + </s> (data.bos)")
        assert found.texts.prompt(tokenizer, "a cat") == [*opening, *cat]
    assert Texts().prompt(tokenizer, "") == [end]


def test_a_token_that_the_post_processor_leaves_out_is_put_before_a_text_where_it_is_asked_for(tmp_path: Path) -> None:
    def names_one(folder: Path) -> None:
        put(folder, byte_level("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"})

    tokenizer = load_tokenizer(str(source(tmp_path / "names_one", names_one)))
    assert Texts.from_recipe(Data(), tokenizer) == Texts()
    assert Texts.from_recipe(Data(bos=True), tokenizer) == Texts(opening=(0,))
    with pytest.raises(RecipeError, match=r"data\.bos = true, but the tokenizer bytes has no bos_token") as caught:
        prepared("bytes", tmp_path / "data", bos=True)
    assert len(caught.value.lines) == 1


def test_bert_reads_a_text_behind_its_first_token(tmp_path: Path) -> None:
    folder = source(tmp_path / "bert", word_piece)
    found = prepared(folder, tmp_path / "data", task="mlm")
    tokenizer = load_tokenizer(str(folder))
    assert documents(found)[0] == [2, *tokenizer.encode("a cat"), 3]


def test_what_a_text_spells_is_text_unless_it_is_to_be_parsed(tmp_path: Path) -> None:
    """Pre-rendered conversations are those tokens in one way only: as transformers reads them."""
    from transformers import AutoTokenizer

    folder = source(tmp_path / "chat", chat)
    theirs = AutoTokenizer.from_pretrained(folder)
    found = {way: prepared(folder, tmp_path / "data", special_tokens=way) for way in ("text", "parse")}
    ids = {way: documents(prepared)[-1] for way, prepared in found.items()}
    assert ids["parse"] != ids["text"]
    end = theirs.eos_token_id
    spelt = theirs.encode(RENDERED)
    assert spelt.index(end) < len(spelt) - 1, "the text ends in a newline"
    flat = np.fromfile(found["parse"].train[0].path / "tokens.bin", "u2").tolist()
    assert flat == [*theirs.encode("a cat"), end, *spelt, end]
    flat = np.fromfile(found["text"].train[0].path / "tokens.bin", "u2").tolist()
    assert flat == [*theirs.encode("a cat"), end, *theirs.encode(RENDERED, split_special_tokens=True), end]
    assert 'spells is text (data.special_tokens "text")' in found["text"].notes[0]
    assert 'spells is that token (data.special_tokens "parse")' in found["parse"].notes[0]


def test_a_parsed_text_that_spells_the_opening_does_not_get_a_second_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(source(tmp_path / "begins", begins)))
    bos, end, cat = tokenizer.bos, tokenizer.end_of_document, tokenizer.encode("a cat")
    parsed = Texts(opening=(bos,), parse=True)
    assert parsed.documents(tokenizer, ["<s>a cat", "a cat"]) == [[bos, *cat, end]] * 2
    assert parsed.prompt(tokenizer, "<s>a cat") == parsed.prompt(tokenizer, "a cat") == [bos, *cat]
    spelt = tokenizer.encode("<s>a cat")
    assert spelt != [bos, *cat]
    assert Texts(opening=(bos,)).documents(tokenizer, ["<s>a cat"]) == [[bos, *spelt, end]]


def test_stores_without_an_opening_keep_their_names(tmp_path: Path) -> None:
    """Of the stores of earlier versions none is made again; what differs lies elsewhere."""
    folder = source(tmp_path / "begins", begins)
    places = {
        str(keys): prepared(folder, tmp_path / "data", **keys).train[0].path.parent.name
        for keys in ({"bos": False}, {}, {"bos": False, "special_tokens": "parse"}, {"special_tokens": "parse"})
    }
    assert len(set(places.values())) == 4
    assert prepared(folder, tmp_path / "data", bos=True).train[0].path.parent.name == places["{}"]
    assert prepared("bytes", tmp_path / "data").train[0].path == prepared("bytes", tmp_path / "data", bos=False).train[0].path


@pytest.mark.parametrize("key", ["data.bos=true", 'data.special_tokens="parse"'])
def test_the_keys_are_for_texts(key: str, tmp_path: Path) -> None:
    recipe = {"data": {"task": "sft", "sources": [{"path": "chats.jsonl"}]}, "model": {"family": "gpt2"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=f'{key.split("=")[0]} is used only with data.task "pretrain" or "mlm"'):
        load(tmp_path / "recipe.json", [key])


def test_a_post_processor_that_only_ends_texts_begins_none(tmp_path: Path) -> None:
    def ends(folder: Path) -> None:
        backend = byte_level("</s>")
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
        put(folder, backend, {"eos_token": "</s>"})

    assert load_tokenizer(str(source(tmp_path / "ends", ends))).opening == ()
