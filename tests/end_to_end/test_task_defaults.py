"""Defaults of a task over the life of a run: decided at the first start, and kept from then on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tools.campaign.cases import WAYS, arguments, numbers
from tools.campaign.ranks import Ended, run_ranks, train
from trainer import fine_tuning
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.cli import main
from trainer.engine import compute_format
from trainer.track import read_metrics

ONE, TWO = WAYS[0], next(way for way in WAYS if way.name == "dp2-zero1")
FORMAT = "precision.dtype"
# the defaults of a version without those of tasks
THEN = (
    *("optimizer.lr=0.001", "optimizer.weight_decay=0.1", "schedule.name=cosine", "schedule.min_lr_ratio=0.1"),
    *("schedule.warmup_steps=0", "precision.dtype=fp32"),
)


def train_on(able: list[bool], command: list[str]) -> int:
    """Train where the devices of the ranks say that they multiply in bf16, or not."""
    compute_format.multiplies_in_bf16 = lambda device: able[int(os.environ["RANK"])]
    return train(command)


def train_with_better_rates(command: list[str]) -> int:
    """Train as a later version would, with another row for the task."""
    fine_tuning.OF_TASKS = {**fine_tuning.OF_TASKS, "pretrain": replace(fine_tuning.OF_TASKS["pretrain"], lr=0.25)}
    return train(command)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that says only what is trained, and on what."""
    folder = tmp_path_factory.mktemp("tuned")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=257, max_position_embeddings=32)).save_pretrained(folder / "base")
    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n\n" for n in range(400)))
    values = {
        "model": {"from_pretrained": str(folder / "base")},
        "data": {"sources": [{"path": str(folder / "text.txt")}], "seq_len": 32, "workers": 1, "eval_fraction": 0.0},
        "batch": {"global_sequences": 4},
        "train": {"steps": 4},
        "checkpoint": {"every": 2, "keep": 9},
    }
    (folder / "recipe.json").write_text(json.dumps(values))
    return folder / "recipe.json"


def run(recipe: Path, run_dir: Path, *keys: str, able: list[bool] | None = None, resume: str = "auto") -> Ended:
    way = TWO if able and len(able) == 2 else ONE
    command = arguments(recipe, run_dir, way, *keys, resume=resume)
    body = (train, command) if able is None else (train_on, able, command)
    ended = run_ranks(*body, world_size=way.processes, log=run_dir.parent / "log")
    assert ended.codes == (0,) * way.processes, ended.said
    return ended


def values_of(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "resolved.json").read_text())["values"]
    return values


def by_task(value: Any) -> dict[str, Any]:
    return {"value": value, "origin": "task default"}


def test_a_run_on_the_cpu_stays_in_fp32_also_on_a_gpu(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "run"
    assert "precision.dtype stays" not in run(recipe, own, "train.steps=2").said
    assert values_of(own)[FORMAT] == by_task("fp32")
    assert values_of(own)["optimizer.lr"] == by_task(5e-5)
    assert read_metrics(own / "metrics.jsonl")[0]["lr"] == 5e-5, "without warm-up"
    said = run(recipe, own, able=[True]).said
    assert "precision.dtype stays fp32, with which the run began; on these devices it would now begin with bf16" in said
    assert "keeps the rules" not in said
    assert values_of(own)[FORMAT] == by_task("fp32")
    assert Manifest.read(own / "checkpoints" / "step-00000004").facts[FORMAT] == "fp32"
    monkeypatch.setattr(compute_format, "multiplies_in_bf16", lambda device: True)
    for weights, dtype in ((own, "fp32"), (own / "export", "bf16")):  # a folder tells of no run
        assert main(["eval", str(weights), str(recipe.parent / "text.txt"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["precision"] == dtype


def test_a_run_on_a_gpu_stays_in_bf16_also_on_the_cpu(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "run"
    run(recipe, own, "train.steps=2", "zero.stage=1", able=[True])
    assert values_of(own)[FORMAT] == by_task("bf16")
    assert json.loads((own / "resolved.json").read_text())["deepspeed_config"]["bf16"]["enabled"]
    assert json.loads((own / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "precision.dtype stays bf16" in run(recipe, own).said
    assert Manifest.read(own / "checkpoints" / "step-00000004").facts[FORMAT] == "bf16"
    assert main(["train", str(recipe), "--run-dir", str(own)]) == 0
    assert "nothing to do" in capsys.readouterr().out, "the answer of a login node without the device"
    checkpoint = str(own / "checkpoints" / "step-00000002")
    said = run(recipe, tmp_path / "other", resume=checkpoint).said
    assert f'{checkpoint} keeps the rules that it began with: precision.dtype = "bf16"' in said


def test_the_ranks_of_mixed_devices_agree(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "mixed", able=[True, False])
    assert values_of(tmp_path / "mixed")[FORMAT] == by_task("fp32")


@pytest.fixture
def earlier(recipe: Path, tmp_path: Path) -> Path:
    """A run as a version left it that had no defaults of tasks."""
    run_dir = tmp_path / "earlier"
    run(recipe, run_dir, "train.steps=2", *THEN)
    resolved = json.loads((run_dir / "resolved.json").read_text())
    for key in THEN:
        resolved["values"][key.partition("=")[0]]["origin"] = "default"
    del resolved["values"]["schedule.warmup_ratio"]
    (run_dir / "resolved.json").write_text(json.dumps(resolved))
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    manifest = Manifest.read(checkpoint)
    del manifest.recipe["schedule"]["warmup_ratio"]
    (checkpoint / MANIFEST).write_bytes(manifest.encode())
    return run_dir


def test_an_earlier_run_keeps_its_rates_and_its_format(recipe: Path, earlier: Path, tmp_path: Path) -> None:
    written = Path(shutil.copytree(earlier, tmp_path / "written"))
    run(recipe, written, *THEN)
    checkpoint = str(earlier / "checkpoints" / "step-00000002")
    kept = (
        'precision.dtype = "fp32", optimizer.lr = 0.001, optimizer.weight_decay = 0.1, schedule.name = "cosine", '
        "schedule.warmup_ratio = null, schedule.min_lr_ratio = 0.1"
    )
    from_checkpoint = run(recipe, tmp_path / "other", able=[True], resume=checkpoint).said
    assert from_checkpoint.count(f"{checkpoint} keeps the rules that it began with: {kept}") == 1
    said = run(recipe, earlier, able=[True]).said
    assert said.count(f"the run in {earlier} keeps the rules that it began with: {kept}") == 1
    assert numbers(earlier, after=2) == numbers(tmp_path / "other", after=2) == numbers(written, after=2)
    assert values_of(earlier)["optimizer.lr"] == {"value": 0.001, "origin": "earlier version"}
    assert values_of(earlier)[FORMAT] == {"value": "fp32", "origin": "earlier version"}


def test_a_run_keeps_its_rates_when_a_later_version_has_better_ones(recipe: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    run(recipe, own, "train.steps=2")
    ended = run_ranks(train_with_better_rates, arguments(recipe, own, ONE), world_size=1, log=tmp_path / "log")
    assert ended.codes == (0,), ended.said
    assert f"the run in {own} keeps the rules that it began with: optimizer.lr = 5e-05" in ended.said
    assert values_of(own)["optimizer.lr"] == {"value": 5e-5, "origin": "earlier version"}
    written = run(recipe, own, "train.steps=5", "optimizer.lr=0.5").said
    assert "keeps the rules" not in written
    assert values_of(own)["optimizer.lr"] == {"value": 0.5, "origin": "--set"}
