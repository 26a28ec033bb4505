"""Supervised fine-tuning as a user starts it: from rows of conversations to a folder that transformers chats with."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.chats import with_template
from tests.end_to_end.runs import HEADS
from tools.campaign.cases import WAYS, Way, arguments, digests, numbers
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.cli import main
from trainer.track import read_metrics

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
ONE = WAYS[0]


def write_recipe(folder: Path, rows: list[dict[str, str]], *, source: dict[str, Any], size: int, **changes: Any) -> Path:
    """`changes` by dotted key with '__' for the dot."""
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2, "max_position_embeddings": 384}
    recipe: dict[str, Any] = {
        "run": {"name": "chat", "dir": str(folder / "runs")},
        "model": {"family": "llama", "config": {**HEADS, **sizes}},
        "data": {"task": "sft", "sources": [{"path": str(folder / "chats.jsonl"), **source}], "workers": 1},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "train": {},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        recipe.setdefault(section, {})[key] = value
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, run_dir: Path, *words: str, way: Way = ONE) -> Ended:
    command = [*arguments(recipe, run_dir, way, resume="auto"), *words]
    return run_ranks(train, command, world_size=way.processes, log=run_dir.parent / "log")


def test_a_resumed_run_is_the_undisturbed_one_and_its_export_chats(tmp_path: Path) -> None:
    rows = [{"instruction": f"double {i}", "output": str(2 * i) * (1 + i % 4)} for i in range(80)]
    recipe = write_recipe(
        tmp_path,
        rows,
        source={},
        size=32,
        data__tokenizer=str(with_template(tmp_path / "tokenizer")),
        data__seq_len=48,
        data__eval_fraction=0.1,
        checkpoint__every=3,
        checkpoint__keep=9,
        train__sample_prompt="double 3",
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for run_dir, targets in ((straight, [6]), (broken, [3, 6])):
        for steps in targets:
            ended = run(recipe, run_dir, "--set", f"train.steps={steps}")
            assert ended.codes == (0,), ended.said
    assert "resumed after step 3" in ended.said
    assert numbers(straight) == numbers(broken)
    assert digests(straight / "checkpoints" / "step-00000006") == digests(broken / "checkpoints" / "step-00000006")

    refused = run(recipe, broken, "--set", "train.steps=9", "--set", "data.learn=all")
    assert refused.codes == (78,)
    assert "data.samples" in refused.said

    assert main(["export", str(broken), str(tmp_path / "exported"), "--verify"]) == 0
    for folder in (broken / "export", tmp_path / "exported"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        question = [{"role": "user", "content": "double 3"}]
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(asked) == "user: double 3<|end|>assistant: "
        assert asked.count(end) == 1
        assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
        out = model.generate(torch.tensor([asked]), max_new_tokens=5, do_sample=False)
        assert len(asked) < out.shape[1] <= len(asked) + 5
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["sample_prompt"] == "double 3"
    assert "<|end|>" not in summary["sample"]


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs the data set beside the checkout: {GSM8K}")
def test_answers_of_grade_school_maths_are_learned(tmp_path: Path) -> None:
    with (GSM8K / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 1000)]
    steps = 40
    recipe = write_recipe(
        tmp_path,
        rows,
        source={"fields": {"prompt": "question", "completion": "answer"}},
        size=64,
        data__tokenizer="bpe:512",
        data__seq_len=384,
        data__eval_fraction=0.05,
        train__steps=steps,
        train__eval_every=20,
        train__eval_sequences=16,
        train__sample_prompt=rows[0]["question"],
    )
    ended = run(recipe, tmp_path / "run")
    assert ended.codes == (0,), ended.said
    assert " conversations in " in ended.said
    assert " of 1,000 conversations were longer than 384 tokens: truncated" in ended.said
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.2, losses
    assert all(0 < record["num_targets"] < 0.75 * 8 * 384 for record in records), "questions are no targets"
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_perplexity"] < summary["unigram_perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    question = [{"role": "user", "content": rows[0]["question"]}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(out[0])
    assert text.startswith(f"user\n{rows[0]['question']}<|endoftext|>assistant\n")
    # The loss of the run, as transformers computes it from the answer alone, of a question that it has learned from.
    whole = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": rows[0]["answer"]}], return_tensors="pt", return_dict=True
    )["input_ids"]
    labels = whole.clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    with torch.no_grad():
        assert float(model(whole, labels=labels).loss) < losses[0] - 1.0
