"""The recipe in a model card: somebody who takes it trains the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.model_folders import saved
from tests.unit.shapes import GPT2
from trainer.checkpoint.model_card import _as_written
from trainer.recipe import load
from trainer.schema import Recipe


def again(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe that the card's text gives when it is read."""
    (folder / "card.json").write_text(json.dumps(_as_written(recipe)))
    return load(folder / "card.json").recipe


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("to be or not to be\n" * 50)
    return {"sources": [{"path": "corpus.txt"}]}


def test_epochs_are_given_without_the_steps_that_follow_from_them(texts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": {"family": "gpt2"}, "data": texts, "train": {"epochs": 2.5}}))
    recipe = load(tmp_path / "recipe.json").recipe
    settled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 62})})
    assert again(settled, tmp_path).train == recipe.train


def test_rates_that_are_defaults_from_scratch_are_given_where_those_of_the_task_differ(
    texts: dict[str, Any], tmp_path: Path
) -> None:
    scratch = Recipe()
    given = {
        "model": {"from_pretrained": str(saved(tmp_path / "base", shape={**GPT2, "vocab_size": 257, "n_positions": 512}))},
        "data": {**texts, "tokenizer": "bytes"},
        "optimizer": {"lr": scratch.optimizer.lr, "weight_decay": scratch.optimizer.weight_decay},
        "schedule": {"name": scratch.schedule.name, "warmup_steps": 0},
        "precision": {"dtype": "fp32"},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    recipe = load(tmp_path / "recipe.json").recipe
    found = again(recipe, tmp_path)
    assert (found.optimizer, found.schedule, found.precision) == (recipe.optimizer, recipe.schedule, recipe.precision)
    del given["optimizer"], given["schedule"]
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    assert load(tmp_path / "recipe.json").recipe.optimizer.lr != scratch.optimizer.lr, "else this test shows nothing"
