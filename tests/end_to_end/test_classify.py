"""Classes and masked tokens as a user starts them: resumed to the bit, exported for transformers, and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForMaskedLM, pipeline

from tests.end_to_end.runs import write_bert_recipe
from tools.campaign.cases import WAYS, Way, arguments, digests, numbers
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.export import LOGITS_TOLERANCE, compare_logits, export
from trainer.cli import main
from trainer.errors import RecipeError
from trainer.inference.model_folder import load_folder

ZERO1 = next(way for way in WAYS if way.name == "dp2-zero1")


def run(recipe: Path, run_dir: Path, *words: str, way: Way = ZERO1) -> Ended:
    command = [*arguments(recipe, run_dir, way, resume="auto"), *words]
    return run_ranks(train, command, world_size=way.processes, log=run_dir.parent / "log")


@pytest.mark.parametrize("task", ["classify", "mlm"])
def test_a_resumed_run_is_the_undisturbed_one_and_its_export_is_its_network(task: str, tmp_path: Path) -> None:
    recipe = write_bert_recipe(tmp_path, task)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for run_dir, targets in ((straight, [4]), (broken, [2, 4])):
        for steps in targets:
            ended = run(recipe, run_dir, "--set", f"train.steps={steps}")
            assert ended.codes == (0, 0), ended.said
    assert "resumed after step 2" in ended.said
    assert numbers(straight) == numbers(broken)
    last = Path("checkpoints") / "step-00000004"
    assert digests(straight / last) == digests(broken / last)

    exported = export(broken / last, tmp_path / "exported")
    assert compare_logits(broken / last, exported.folder, exported.dtype) <= LOGITS_TOLERANCE
    with pytest.raises(RecipeError, match="give one that continues texts"):
        load_folder(exported.folder)
    if task == "mlm":
        guesses(exported.folder)
    else:
        sorts(exported.folder, json.loads((broken / "summary.json").read_text()))


def guesses(folder: Path) -> None:
    """It loads whole, ties included, and the tokenizer beside it has the mask."""
    model, told = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 258
    guess = pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"3 is {tokenizer.mask_token}dd", top_k=1)[0]
    assert 0.0 < guess["score"] <= 1.0


def sorts(folder: Path, summary: dict[str, Any]) -> None:
    (named,) = pipeline("text-classification", model=str(folder))("7 is odd")
    assert named["label"] in ("even", "odd")
    assert summary["eval_majority"] >= 0.5
    assert {"eval_accuracy", "eval_f1", "eval_f1_positive"} <= summary.keys()
    assert "unigram_perplexity" not in summary


@pytest.mark.parametrize("task", ["classify", pytest.param("mlm", marks=pytest.mark.grid)])
def test_verify_compares_layouts_with_the_task_s_own_head(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(write_bert_recipe(tmp_path, task)), "--layouts", "tp2"]) == 0
    assert "rounding" in capsys.readouterr().out
