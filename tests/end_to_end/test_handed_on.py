"""A model and its tokenizer, taken from a folder, trained and handed on, through the commands that a user starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.unit.tokenizer_folders import begins, observed
from tools.campaign.cases import WAYS, arguments
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.cli import main

ONE = WAYS[0]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "eos_token_id": [2, 0],
    "bos_token_id": 1,
    "pad_token_id": 0,
}
TEXTS = ["<|im_start|>user\nhi<|im_end|>\n" * 8, "plain text, some of it </s> spelt " * 8]
# Has a question and its answer end in a token of its own, as chat models do.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[MASK]' + m['role'] + '\n' + m['content'] + '<think>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[MASK]assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose tokenizer has the template of the chat model that its authors made of it, as Qwen's do."""
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    begins(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    size = len(AutoTokenizer.from_pretrained(folder))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, vocab_size=size, **ids))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def trained(source: Path, folder: Path, **data: Any) -> tuple[Ended, Path]:
    folder.mkdir(exist_ok=True)
    rows = [{"text": text, "prompt": text[:9], "completion": "yes"} for text in TEXTS * 8]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"from_pretrained": str(source)},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "tokenizer": str(source),
            "seq_len": 64,
            "workers": 1,
            **data,
        },
        "batch": {"global_sequences": 2, "micro_sequences": 2},
        "train": {"steps": 2, "sample_prompt": "plain"},
        "checkpoint": {"every": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    command = arguments(folder / "recipe.json", folder / "run", ONE, resume="never")
    ended = run_ranks(train, command, world_size=1, log=folder / "log")
    assert ended.codes == (0,), ended.said
    return ended, folder / "run"


@pytest.fixture(scope="module")
def pretrained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    return trained(source, tmp_path_factory.mktemp("pretrained"))


def asked(folder: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "plain", "--max-new-tokens", "3", *words]) == 0
    told = capsys.readouterr()
    return told.out, told.err


def test_continued_pretraining_and_then_sft_hand_on_what_they_were_given(
    source: Path, pretrained: tuple[Ended, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = observed(source)
    ended, run = pretrained
    assert "a document is <s> + its text + </s> (data.bos); a special token that a text spells is text" in " ".join(
        ended.said.split()
    )
    assert main(["export", str(run), str(tmp_path / "exported"), "--verify"]) == 0
    for folder in (run / "export", tmp_path / "exported"):
        assert observed(folder) == expected
        config = AutoConfig.from_pretrained(folder)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.finetuning_task) == (1, 2, 0, "pretrain")
        assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    out, err = asked(run / "export", capsys=capsys)
    assert "continued as it is: data.task pretrain trained it; --chat asks it" in err
    assert out.startswith("plain")
    out, err = asked(source, capsys=capsys)
    assert "continued as it is: its generation does not end at the end of a turn" in err

    ended, run = trained(run / "export", tmp_path / "sft", task="sft")
    assert "data.bos" not in ended.said
    assert observed(run / "export") == expected
    think = AutoTokenizer.from_pretrained(run / "export").convert_tokens_to_ids("<think>")
    generation = json.loads((run / "export" / "generation_config.json").read_text())
    assert generation == {**GENERATION, "eos_token_id": [2, 0, think]}
    out, err = asked(run / "export", capsys=capsys)
    assert "asked as a user's message: data.task sft trained it; --raw continues it" in err
    assert "plain" not in out
    assert asked(run / "export", "--raw", capsys=capsys)[0].startswith("plain")
    config = json.loads((run / "export" / "config.json").read_text())
    del config["finetuning_task"]  # as in a folder from elsewhere
    (run / "export" / "config.json").write_text(json.dumps(config))
    assert "asked as a user's message: its generation ends at the end of a turn" in asked(run / "export", capsys=capsys)[1]


def test_a_model_without_a_template_is_not_asked_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".jinja":
            (plain / path.name).write_bytes(path.read_bytes())
    assert "its tokenizer has no chat template" in asked(plain, capsys=capsys)[1]
    assert main(["generate", str(plain), "--prompt", "a", "--chat"]) == 78
    assert "--chat: the tokenizer in" in capsys.readouterr().err


def test_an_export_that_would_tokenize_otherwise_is_not_written(
    pretrained: tuple[Ended, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.data import handed_on_tokenizer

    monkeypatch.setattr(handed_on_tokenizer, "_unlike", lambda folder, tokenizer: "the first text is another")
    assert main(["export", str(pretrained[1]), str(tmp_path / "out")]) == 65
    assert not (tmp_path / "out").exists()
