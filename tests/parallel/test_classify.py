"""Classification and masked tokens in several layouts against one process: targets, losses, statistics, norms and weights.

Rows differ in their numbers of texts, and SGD shows a gradient that is scaled by another number of them or counted twice.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.parallel.training import whole_weights
from tests.spawn import spawn
from trainer.data import prepare
from trainer.data.loader import EvalData, TrainData
from trainer.data.targets import targets_of
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe

STEPS, S = 3, 32
LAYOUTS = {
    "dp2": (Layout(dp=2), 1),
    "dp2-zero3": (Layout(dp=2), 3),
    "tp2": (Layout(tp=2), 1),
    "pp2": (Layout(pp=2), 1),
    "tp2-pp2": (Layout(tp=2, pp=2), 1),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36},
    # Dropout, so that masks of the head are seen to be the same in every layout.
    "bert": {
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36},
        **{"max_position_embeddings": S, "hidden_dropout_prob": 0.2, "initializer_range": 0.2},
    },
}
CASES = [("classify", "llama"), ("classify", "bert"), ("mlm", "bert")]


def recipe_of(folder: Path, task: str, layout: Layout, zero: int) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {
                "task": task,
                "sources": [{"path": str(folder / "rows.jsonl")}],
                "seq_len": S,
                "eval_fraction": 0.2,
                "workers": 1,
            },
            "parallel": {"tensor": layout.tp, "pipeline": layout.pp},
            "batch": {"global_sequences": 8, "micro_sequences": 2},
            "zero": {"stage": zero, "stage3_param_persistence_threshold": 0},
            "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01},
            "train": {"clip_norm": 0.3},
        }
    )


def train(mesh: Mesh, folder: Path, task: str, family: str, zero: int) -> dict[str, Any]:
    recipe = recipe_of(folder, task, mesh.layout, zero)
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    found = prepare(
        recipe.data, seed=0, cache_dir=folder / "cache", build=mesh.rank == 0, progress=lambda done, total, what: None
    )
    network = from_hf(family, {**SHAPES[family], "vocab_size": found.tokenizer.vocab_size})
    network = replace(network, classes=found.classes)
    engine = Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=network.largest_weight),
        fill=lambda block: initialise(block, seed=0),
    )
    targets = {
        part: targets_of(recipe.data, found.tokenizer, causal=network.causal, seed=0, part=part)
        for part in ("training", "evaluation")
    }
    keys: dict[str, Any] = {"row_tokens": S, "isolate_documents": True}
    data = TrainData(found.train, found.weights, seed=0, global_sequences=8, targets=targets["training"], **keys)
    held_out = EvalData(found.evaluation, sequences=5, targets=targets["evaluation"], **keys)
    place = {"dp_rank": mesh.data.rank, "dp": mesh.data.size, "micro_sequences": 2}
    results = [
        engine.step(list(data.micro_batches(step, **place, read=engine.execution.reads_tokens)), step=step, lr=0.1)
        for step in range(STEPS)
    ]
    evaluation = engine.evaluator.evaluate(held_out.micro_batches(**place))
    weights = whole_weights(engine)
    engine.close()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "targets": [result.num_targets for result in results],
        "evaluation": [*evaluation.sums, evaluation.num_targets],
        "weights": weights,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    rows = [{"text": f"{i} " + "so " * (i % 9 * (i % 2)), "label": ["a", "b", "c"][i % 5 % 3]} for i in range(150)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(task, family): spawn(train, Layout(), folder, task, family, 1)[0] for task, family in CASES}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("task", "family"), CASES)
def test_every_layout_is_the_same_training(name: str, task: str, family: str, folder: Path, alone: Any) -> None:
    layout, zero = LAYOUTS[name]
    expected = alone[task, family]
    assert len(set(expected["targets"])) > 1, "the steps must differ in their numbers of targets"
    for got in spawn(train, layout, folder, task, family, zero):
        assert got["targets"] == expected["targets"]
        # fp32 sums in another order, as in the other parity tests.
        for key in ("loss", "norm", "evaluation"):
            np.testing.assert_allclose(got[key], expected[key], rtol=4e-6, err_msg=key)
        for weight_name, weight in got["weights"].items():
            np.testing.assert_allclose(weight, expected["weights"][weight_name], rtol=0, atol=1e-6, err_msg=weight_name)
