"""What a recipe for translations may say, and what is refused with the keys and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.recipe import load

SOURCE = {"path": "a.en", "target_path": "a.de"}
MODEL = {"family": "marian", "config": {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.en", "a.de", "rows.jsonl"):
        Path(name).write_text("x\n")


def recipe(**changes: Any) -> Path:
    given = {"model": MODEL, "data": {"task": "translate", "sources": [SOURCE]}} | changes
    Path("recipe.json").write_text(json.dumps(given))
    return Path("recipe.json")


def data(**changes: Any) -> dict[str, Any]:
    return {"data": {"task": "translate", "sources": [SOURCE], **changes}}


def test_a_row_has_two_halves() -> None:
    assert load(recipe(**data(seq_len=100))).recipe.data.row_tokens == 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"task": "translate"}}, "source code, which holds no translations"),
        (data(isolate_documents=False), "each target belongs to one source; legal: true"),
        (data(sources=[SOURCE | {"field": "x"}]), "what rows call their fields is said in fields"),
        (data(sources=[{"path": "rows.jsonl", "fields": {"prompt": "x"}}]), "data.sources[0].fields.prompt is used only with"),
        (data(sources=[SOURCE | {"fields": {"source": "x"}}]), "data.sources[0].target_path there are lines"),
        (data(sources=[SOURCE | {"columns": ["a", "b"]}]), "data.sources[0].columns names what rows have"),
        (data(sources=[SOURCE | {"target_path": "b.de"}]), 'data.sources[0].target_path = "b.de" does not exist'),
        ({"data": {"sources": [SOURCE]}}, 'data.sources[0].target_path is used only with data.task "translate"'),
        ({"data": {}, "model": MODEL}, "reads one text and writes another, and data.task is pretrain; legal families"),
        (
            data() | {"model": {"family": "llama"}},
            "has no encoder, and data.task is translate; legal families for translate: marian, t5",
        ),
        (data() | {"train": {"eval_translations": 9}}, "train.eval_translations = 9 compares translations with those"),
        ({"data": {}, "model": {"family": "gpt2"}, "train": {"beams": 2}}, "train.beams is used only with data.task"),
        (data() | {"tuning": {"method": "lora"}}, "family marian is trained whole here; remove it"),
        (data() | {"model": {**MODEL, "config": {"encoder_ffn_dim": 8}}}, "both sides have one size here; legal: 8"),
        (
            data() | {"model": {**MODEL, "config": {**MODEL["config"], "vocab_size": 300, "decoder_vocab_size": 290}}},
            "decoder_vocab_size = 290, but the embedding is shared",
        ),
        (data() | {"train": {"label_smoothing": 1.0}}, "train.label_smoothing"),
        (
            {"data": {}, "model": {"family": "t5"}},
            "reads one text and writes another, and data.task is pretrain; legal families",
        ),
        (data() | {"model": {"family": "t5"}, "tuning": {"method": "lora"}}, "family t5 is trained whole here; remove it"),
        (
            data() | {"model": {"family": "t5", "config": {"num_heads": 6}}, "parallel": {"tensor": 4}},
            "parallel.tensor = 4 does not divide num_heads = 6 of the network; legal: 1, 2",
        ),
        (
            data() | {"model": {"family": "t5", "config": {"n_positions": 512, "d_ff": 0}}},
            "d_ff = 0: must be 1 to",
        ),
        (
            data() | {"model": {"family": "t5"}, "parallel": {"pipeline": 16}, "batch": {"global_sequences": 16}},
            "16 stages, but the model has 12 layers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(recipe(**changes))
    assert any(said in line for line in refused.value.lines), refused.value.lines
