"""A tokenizer that was trained with is handed on as it came: beside each model, transformers makes of the export what it makes
of the source. The oracle is AutoTokenizer on both folders, on real tokenizers that packages carry and on small ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tests.unit.shapes import TINY, TINY_DECODER
from tests.unit.tokenizer_folders import (
    CORPUS,
    TEXTS,
    begins,
    chat,
    deepseek,
    dropping,
    llama3,
    mistral,
    observed,
    older,
    unigram,
    word_piece,
)
from trainer.data.auto_tokenizer import AUTO_MAP
from trainer.data.handed_on_tokenizer import beside_model, require_same
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer, make_tokenizer, reopen_tokenizer, train_bpe
from trainer.errors import DataError, RecipeError
from trainer.model.families import FAMILIES
from trainer.model.hf_config import from_hf
from trainer.model.model_files import ModelFiles

SOURCES: dict[str, Callable[[Path], None]] = {
    made.__name__: made for made in (chat, word_piece, unigram, begins, older, dropping, llama3, deepseek, mistral)
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("sources") / name
            folder.mkdir()
            SOURCES[name](folder)
            made[name] = folder
        return made[name]

    return source


def handed_on(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """A folder as an export has it, by way of what a checkpoint has."""
    beside_model(tokenizer, config).save(folder / "checkpoint")
    out = folder / "export"
    shutil.copytree(folder / "checkpoint", out)
    (out / "config.json").write_text(json.dumps(config))
    require_same(out, tokenizer)
    return out


OPENINGS = {"llama3": "<|begin_of_text|>", "begins": "<s>", "mistral": "<s>", "word_piece": "[CLS]"}


# Loading the largest ones takes a second each time.
LARGE = {"deepseek"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.grid] * (name in LARGE)) for name in SOURCES])
def test_an_export_tokenizes_as_its_source(name: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Continued pretraining changes nothing: what a text spells is text while training, and the export's business there."""
    source = sources(name)
    expected = observed(source)
    tokenizer = load_tokenizer(str(source))
    out = handed_on(tokenizer, tmp_path, model_type="llama")
    assert observed(out) == expected
    assert reopen_tokenizer(out).fingerprint == tokenizer.fingerprint
    ours = [*tokenizer.opening, *tokenizer.encode(TEXTS[1])]
    assert ours == expected[f"with {TEXTS[1]}"]["input_ids"][: len(ours)]
    assert "".join(map(tokenizer.spelling_of, tokenizer.opening)) == OPENINGS.get(name, "")
    for text in TEXTS:
        assert tokenizer.encode(text) == expected[f"split {text}"][len(tokenizer.opening) :][: len(tokenizer.encode(text))]
        assert tokenizer.encode(text, special=True) == expected[f"without {text}"]


def test_what_the_recipe_adds_is_all_that_differs(sources: Callable[[str], Path], tmp_path: Path) -> None:
    for name, made, added in [
        ("chat", Tokenizer.for_chat, set()),
        ("begins", Tokenizer.for_chat, set()),
        ("word_piece", Tokenizer.for_masking, set()),
        ("dropping", Tokenizer.for_chat, {"chat_template"}),
        ("begins", Tokenizer.for_masking, set()),
    ]:
        expected = observed(sources(name))
        found = observed(handed_on(made(load_tokenizer(str(sources(name)))), tmp_path / f"{name}-{made.__name__}"))
        assert {key for key in expected if found[key] != expected[key]} == added
        assert found.keys() - expected.keys() <= {"chat None"}


def test_a_mask_and_padding_are_added_where_there_is_none(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("dropping")))
    masking = observed(handed_on(tokenizer.for_masking(), tmp_path / "mask"))
    assert masking["named"]["mask"] == tokenizer.vocab_size == masking["size"] - 1
    sorting = observed(handed_on(tokenizer.for_classification(), tmp_path / "classes"))
    assert sorting["named"]["pad"] == tokenizer.end_of_document


def test_merges_are_never_dropped_in_training_and_still_in_the_export(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("dropping")))
    text = " ".join(CORPUS)
    assert tokenizer.encode(text) == tokenizer.encode(text)
    assert len(tokenizer.encode(text)) == len(tokenizer.for_chat().encode(text))
    assert [note for note in tokenizer.notes if "drops merges at random (dropout 0.5)" in note]
    saved = json.loads((handed_on(tokenizer.for_chat(), tmp_path) / "tokenizer.json").read_text())
    assert saved["model"]["dropout"] == 0.5
    assert [*load_tokenizer(str(sources("chat"))).notes] == []


def test_a_class_that_builds_another_tokenizer_is_followed_and_said(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """tokenizer.json splits by another rule than Qwen2's class, which is what the model's authors and users run."""
    source = tmp_path / "source"
    shutil.copytree(sources("chat"), source)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(source / "tokenizer.json"))
    tokenizer = load_tokenizer(str(source))
    (remark,) = tokenizer.notes
    assert "transformers builds a Qwen2Tokenizer" in remark
    assert "tokens are those of transformers" in remark
    text = "Hello World's"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(source).encode(text) != backend.encode(text).ids
    assert observed(handed_on(tokenizer, tmp_path, model_type="qwen2")) == observed(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_every_tokenizer(family: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """qwen2 among them, of which transformers takes its own class whatever the folder says."""
    tokenizers = {
        "bytes": make_tokenizer("bytes"),
        "bpe": train_bpe(CORPUS, 300),
        "chat": load_tokenizer(str(sources("chat"))),
        "begins": load_tokenizer(str(sources("begins"))),
        "unigram": load_tokenizer(str(sources("unigram"))),
    }
    for name, tokenizer in tokenizers.items():
        network = from_hf(family, {**TINY.get(family, TINY_DECODER), "vocab_size": tokenizer.vocab_size})
        files = ModelFiles(network, tokenizer, "float32")
        folder = tmp_path / name
        folder.mkdir()
        ModelFiles(network, beside_model(tokenizer, files.config), "float32").save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in [*CORPUS[:2], *TEXTS]:
            bare = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert bare == tokenizer.encode(text), (name, text)
            assert theirs.decode(bare) == tokenizer.decode(bare)
        assert load_tokenizer(str(folder)).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_what_a_folder_runs_only_when_it_is_trusted_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that keeps transformers from building another class is real code, for whoever trusts it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    tokenizer = train_bpe(CORPUS, 300)
    out = handed_on(tokenizer, tmp_path, model_type="qwen2")
    assert json.loads((out / "tokenizer_config.json").read_text())["auto_map"] == AUTO_MAP
    for trust in (None, False, True):
        theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=trust)
        assert [theirs.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    again = beside_model(reopen_tokenizer(out), {"model_type": "qwen2"})
    assert again.config["auto_map"] == AUTO_MAP
    assert "auto_map" not in json.loads(
        (handed_on(tokenizer, tmp_path / "other", model_type="llama") / "tokenizer_config.json").read_text()
    )


def test_an_export_that_would_tokenize_otherwise_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("begins")))
    out = handed_on(tokenizer, tmp_path, model_type="llama")
    config = json.loads((out / "tokenizer_config.json").read_text())
    for change, told in [
        ({"padding_side": "right"}, "padding_side is 'left' and 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens is 'False' and 'True'"),
        ({"pad_token": "</s>"}, "pad_token is '<pad>' and '</s>'"),
        ({"chat_template": "other"}, "chat_template is"),
    ]:
        (out / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DataError, match=told) as caught:
            require_same(out, tokenizer)
        assert len(caught.value.lines) == 1
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    backend = Backend.from_file(str(out / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(out / "tokenizer.json"))
    with pytest.raises(DataError, match="Hello, world! It's the 3rd"):
        require_same(out, tokenizer)


def test_a_folder_with_code_of_its_own_is_read_without_it(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("begins"), source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Bomb", "auto_map": {"AutoTokenizer": [None, "bomb.Bomb"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "bomb.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    tokenizer = load_tokenizer(str(source))
    assert [note for note in tokenizer.notes if "its tokenizer.json is read as it is" in note]
    assert tokenizer.encode(TEXTS[1]) == load_tokenizer(str(sources("begins"))).encode(TEXTS[1])
    assert not (tmp_path / "executed").exists()


def test_sentencepiece_is_named_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    with pytest.raises(RecipeError, match="sentencepiece"):
        load_tokenizer(str(tmp_path))
