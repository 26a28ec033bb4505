"""Supervised fine-tuning in several layouts against one process: the conversations, their targets, losses and weights.

The numbers of targets of rows and ranks differ on purpose, and SGD shows a gradient that is scaled by another number of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.parallel.training import LLAMA, whole_weights
from tests.spawn import spawn
from trainer.data import prepare
from trainer.data.loader import EvalData, TrainData
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe

STEPS, S = 3, 64
LAYOUTS = {"dp2": Layout(dp=2), "tp2": Layout(tp=2), "pp2": Layout(pp=2)}


def recipe_of(folder: Path, layout: Layout) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"family": "llama"},
            "data": {
                "task": "sft",
                "sources": [{"path": str(folder / "chats.jsonl")}],
                "seq_len": S,
                "eval_fraction": 0.2,
                "workers": 1,
            },
            "parallel": {"tensor": layout.tp, "pipeline": layout.pp},
            "batch": {"global_sequences": 8, "micro_sequences": 2},
            "zero": {"stage": 1},
            "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01},
            "train": {"clip_norm": 0.3},
        }
    )


def train(mesh: Mesh, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(folder, mesh.layout)
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    network = from_hf("llama", {**LLAMA, "vocab_size": 257, "max_position_embeddings": S})
    engine = Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=network.largest_weight),
        fill=lambda block: initialise(block, seed=0),
    )
    found = prepare(
        recipe.data, seed=0, cache_dir=folder / "cache", build=mesh.rank == 0, progress=lambda done, total, what: None
    )
    data = TrainData(found.train, found.weights, row_tokens=S, seed=0, isolate_documents=True, global_sequences=8)
    held_out = EvalData(found.evaluation, row_tokens=S, isolate_documents=True, sequences=5)
    place = {"dp_rank": mesh.data.rank, "dp": mesh.data.size, "micro_sequences": 2}
    results, learned = [], []
    for step in range(STEPS):
        batches = list(data.micro_batches(step, **place, read=engine.execution.reads_tokens))
        learned.append([(labels != IGNORE).sum(-1).tolist() for labels in (batch.labels_BS for batch in batches)])
        results.append(engine.step(batches, step=step, lr=0.1))
    evaluation = engine.evaluator.evaluate(held_out.micro_batches(**place))
    weights = whole_weights(engine)
    engine.close()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "targets": [result.num_targets for result in results],
        "evaluation": [*evaluation.sums, evaluation.num_targets],
        "learned": learned,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"prompt": f"{i}?", "completion": "so " * (i % 7) + "on"} for i in range(90)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    (alone,) = spawn(train, Layout(), folder)
    in_rows = [row for step in alone["learned"] for batch in step for row in batch]
    assert len(set(in_rows)) > 3, "the rows must differ in their numbers of targets"
    assert alone["targets"] == [sum(row for batch in step for row in batch) for step in alone["learned"]]
    return alone


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_fine_tuning(name: str, folder: Path, expected: dict[str, Any]) -> None:
    for got in spawn(train, LAYOUTS[name], folder):
        assert got["targets"] == expected["targets"]
        # fp32 sums in another order, as in the other parity tests.
        for key in ("loss", "norm", "evaluation"):
            np.testing.assert_allclose(got[key], expected[key], rtol=2e-6, err_msg=key)
        for weight_name, weight in got["weights"].items():
            np.testing.assert_allclose(weight, expected["weights"][weight_name], rtol=0, atol=1e-6, err_msg=weight_name)
