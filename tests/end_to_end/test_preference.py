"""Learning from pairs as a user starts it: resumed to the bit, in other layouts, and exported to a folder of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.runs import HEADS
from tools.campaign.cases import WAYS, Way, arguments, digests, numbers
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.track import read_metrics

BY_NAME = {way.name: way for way in WAYS}
ONE = BY_NAME["one"]
ROWS = [{"prompt": f"double {n}", "chosen": str(2 * n), "rejected": str(3 * n + 1) + "!" * (n % 4)} for n in range(80)]


def write_recipe(folder: Path, **changes: Any) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    recipe = {
        "run": {"name": "pairs", "dir": str(folder / "runs")},
        "model": {"family": "llama", "config": {**HEADS, **sizes}},
        "data": {
            "task": "preference",
            "sources": [{"path": str(folder / "pairs.jsonl")}],
            "seq_len": 128,
            "eval_fraction": 0.2,
            "workers": 1,
        },
        "batch": {"global_sequences": 4, "micro_sequences": 1},
        "optimizer": {"lr": 0.001},
        "schedule": {"name": "constant"},
        "train": {"steps": 6, "eval_every": 3},
        "checkpoint": {"every": 3, "keep": 9},
        **changes,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, run_dir: Path, *words: str, way: Way = ONE, resume: str = "auto") -> Ended:
    command = [*arguments(recipe, run_dir, way, resume=resume), *words]
    return run_ranks(train, command, world_size=way.processes, log=run_dir.parent / "log")


def rewards(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name.startswith("rewards/")}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_a_resumed_run_is_the_undisturbed_one_and_its_export_loads(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for run_dir, targets in ((straight, [6]), (broken, [3, 6])):
        for steps in targets:
            ended = run(recipe, run_dir, "--set", f"train.steps={steps}")
            assert ended.codes == (0,), ended.said
    assert "resumed after step 3" in ended.said
    assert ": eval loss " in ended.said
    assert ", reward margin " in ended.said
    assert numbers(straight) == numbers(broken)
    assert rewards(straight) == rewards(broken)
    assert digests(straight / "checkpoints" / "step-00000006") == digests(broken / "checkpoints" / "step-00000006")
    evaluations = [json.loads(line) for line in (straight / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[-1].keys() >= {f"eval_rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert evaluations[-1]["eval_rewards/margins"] > 0, "what is held out is preferred too"
    summary = json.loads((straight / "summary.json").read_text())
    assert "eval_rewards/accuracies" in summary
    assert "unigram_perplexity" not in summary

    tokenizer = AutoTokenizer.from_pretrained(straight / "export")
    model = AutoModelForCausalLM.from_pretrained(straight / "export")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "double 3"}], add_generation_prompt=True, return_dict=False
    )
    assert model.generate(torch.tensor([asked]), max_new_tokens=3, do_sample=False).shape[1] > len(asked)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, as one process left it."""
    folder = tmp_path_factory.mktemp("begun")
    ended = run(write_recipe(folder), folder / "run", "--set", "train.steps=3")
    assert ended.codes == (0,), ended.said
    return folder


@pytest.mark.parametrize("way", ["tp2xpp2", pytest.param("dp2-zero3", marks=pytest.mark.grid)])
def test_another_layout_goes_on_with_the_same_reference(way: str, begun: Path, tmp_path: Path) -> None:
    """Also where the run goes on in a folder of its own."""
    recipe = write_recipe(tmp_path)
    for name in ("same", "other"):
        shutil.copytree(begun / "run", tmp_path / name)
    assert run(recipe, tmp_path / "same").codes == (0,)
    origin = tmp_path / "other" / "checkpoints" / "step-00000003"
    ended = run(recipe, tmp_path / "forked", way=BY_NAME[way], resume=str(origin))
    assert set(ended.codes) == {0}, ended.said
    kept, taken = (
        {path.name: path.read_bytes() for path in (folder / "reference").iterdir()}
        for folder in (begun / "run", tmp_path / "forked")
    )
    assert kept == taken
    expected = rewards(tmp_path / "same")[3:]
    got = rewards(tmp_path / "forked")
    # fp32 sums in another order; rewards are differences of sums of log-probabilities.
    np.testing.assert_allclose([list(r.values()) for r in got], [list(r.values()) for r in expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "says"), [("missing", "No such file"), ("flipped", "the SHA-256 of"), ("foreign", "nothing is known of")]
)
def test_a_run_does_not_go_on_without_its_reference(damage: str, says: str, begun: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    shutil.copytree(begun / "run", tmp_path / "run")
    reference = tmp_path / "run" / "reference"
    if damage == "missing":
        shutil.rmtree(reference)
    elif damage == "flipped":
        path = next(path for path in reference.iterdir() if path.suffix == ".bin")
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
    else:
        header = json.loads((reference / "header.json").read_text())
        (reference / "header.json").write_text(json.dumps({**header, "sha256": {}}))
    ended = run(recipe, tmp_path / "run")
    assert ended.codes == (65,), ended.said
    assert "reference: the log-probabilities of the answers before training cannot be read: " in ended.said
    assert says in ended.said
