"""Special tokens and generation_config.json: those of the folder that a model came from, and what it was taught beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig

from tests.unit.shapes import TINY, TINY_DECODER
from tests.unit.tokenizer_folders import begins, chat, word_piece
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer, make_tokenizer
from trainer.errors import DataError
from trainer.model.auto_network import AutoNetwork
from trainer.model.families import FAMILIES
from trainer.model.hf_config import from_hf
from trainer.model.model_files import ModelFiles
from trainer.model.origin import Origin

QWEN3 = {
    **{"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    **{"eos_token_id": [2, 0], "pad_token_id": 0, "bos_token_id": 0},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    chat(folder)
    (folder / "generation_config.json").write_text(json.dumps({**QWEN3, "_from_model_config": True}))
    return folder


def files(tokenizer: Tokenizer, family: str = "llama", **more: Any) -> ModelFiles:
    network = from_hf(family, {**TINY.get(family, TINY_DECODER), "vocab_size": tokenizer.vocab_size})
    return ModelFiles(network, tokenizer, "float32", **more)


def saved(written: ModelFiles, folder: Path) -> tuple[Any, GenerationConfig]:
    """As transformers reads config.json, and how a model of it would write."""
    folder.mkdir()
    written.save(folder)
    config = AutoConfig.from_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        return config, GenerationConfig.from_model_config(config)
    return config, GenerationConfig.from_pretrained(folder)


def test_the_token_that_begins_texts_is_the_tokenizer_s(tmp_path: Path) -> None:
    (tmp_path / "begins").mkdir()
    begins(tmp_path / "begins")
    tokenizer = load_tokenizer(str(tmp_path / "begins"))
    config, generation = saved(files(tokenizer), tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_one_a_text_begins_after_the_end_of_a_document(family: str, tmp_path: Path) -> None:
    config = files(make_tokenizer("bytes"), family).config
    assert (config["bos_token_id"], config["eos_token_id"]) == (None if family == "bert" else 256, 256)


def test_what_the_folder_said_is_kept(source: Path, tmp_path: Path) -> None:
    """Two ends, of which config.json names one, and how the authors sample."""
    tokenizer = load_tokenizer(str(source))
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None}
    origin = Origin.of(source, ids, tokenizer, same_tokenizer=True)
    config, generation = saved(files(tokenizer, "qwen3", origin=origin), tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 2, 0)
    assert config.finetuning_task == "pretrain"
    for name, value in QWEN3.items():
        assert getattr(generation, name) == value
    assert "_from_model_config" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_what_ends_a_turn_is_added_to_what_the_folder_said(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(source))
    origin = Origin.of(source, {"eos_token_id": 0}, tokenizer, same_tokenizer=True)
    taught = files(tokenizer.for_chat(), origin=origin, task="sft", end_of_turn=1)
    assert saved(taught, tmp_path / "out")[1].eos_token_id == [2, 0, 1]
    assert files(tokenizer, task="sft", end_of_turn=1).generation == {"eos_token_id": [1, 2]}
    assert files(tokenizer).generation is None, "config.json says all"


@pytest.mark.parametrize("same", [True, False])
def test_with_another_tokenizer_ids_are_not_kept(same: bool, source: Path) -> None:
    """The tokens that the folder names are looked up by their spelling, where the recipe does not name the folder itself."""
    said = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
    tokenizer = load_tokenizer(str(source)) if same else make_tokenizer("bytes")
    origin = Origin.of(source, said, tokenizer, same_tokenizer=False)
    written = files(tokenizer, origin=origin)
    assert {name: written.config[name] for name in said} == (
        said if same else {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}
    )
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert written.generation == (QWEN3 if same else {**sampling, "eos_token_id": 256})


@pytest.mark.parametrize("same", [True, False])
def test_family_auto_does_the_same(same: bool, source: Path) -> None:
    tokenizer = load_tokenizer(str(source)) if same else make_tokenizer("bytes")
    said = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    network = AutoNetwork(GPTNeoXConfig(vocab_size=500, **said), "GPTNeoXForCausalLM", lambda: None, 500, 1, 1, 1, None)
    origin = Origin.of(source, said, tokenizer, same_tokenizer=False)
    written = ModelFiles(network, tokenizer, "float32", task="sft", end_of_turn=1, origin=origin)
    other = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}
    assert {name: written.config[name] for name in said} == (said if same else other)
    assert written.config["finetuning_task"] == "sft"
    generation = written.generation
    assert generation is not None
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [2, 0, 1] if same else [1, 256])


def test_translations_begin_after_what_they_were_trained_to_follow(source: Path) -> None:
    tokenizer = load_tokenizer(str(source)).ending_texts()
    said = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 7, "forced_eos_token_id": 2, "bos_token_id": 5}
    origin = Origin.of(source, said, tokenizer, same_tokenizer=True)
    config = files(tokenizer, "marian", origin=origin, task="translate").config
    assert {name: config[name] for name in said} == {**said, "decoder_start_token_id": tokenizer.start_of_target}
    assert tokenizer.start_of_target == 0


def test_a_model_that_writes_nothing_has_no_generation_config(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    word_piece(tmp_path / "bert")
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    origin = Origin.of(source, {"pad_token_id": 0}, tokenizer, same_tokenizer=True)
    written = files(tokenizer, "bert", origin=origin, task="mlm")
    assert written.generation is None
    assert (written.config["bos_token_id"], written.config["pad_token_id"]) == (None, 0)


def test_a_damaged_generation_config_is_named(source: Path) -> None:
    (source / "generation_config.json").write_text("[1")
    with pytest.raises(DataError, match=r"generation_config\.json: not readable JSON") as caught:
        Origin.of(source, {}, make_tokenizer("bytes"), same_tokenizer=True)
    assert len(caught.value.lines) == 1


def test_a_model_written_so_stops_at_each_of_its_ends(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(source))
    origin = Origin.of(source, {"eos_token_id": 2}, tokenizer, same_tokenizer=True)
    folder = tmp_path / "out"
    saved(files(tokenizer.for_chat(), origin=origin, task="sft", end_of_turn=1), folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "weights")
    (folder / "model.safetensors").write_bytes((tmp_path / "weights" / "model.safetensors").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(loaded.lm_head.weight)
    for end in (2, 0, 1):  # the likeliest token by far
        loaded.lm_head.bias = torch.nn.Parameter(torch.zeros(tokenizer.vocab_size))
        with torch.no_grad():
            loaded.lm_head.bias[end] = 9.0
        assert loaded.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=4).tolist() == [[5, 6, end]]
