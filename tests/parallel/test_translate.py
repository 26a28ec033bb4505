"""Translation in several layouts against one process: the pairs, their targets, losses, norms and updated weights.

Sources and targets differ in length, the numbers of targets of rows and ranks too, labels are smoothed, and SGD shows a
gradient that is scaled by another number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.parallel.test_engine_parity import whole_weights
from tests.spawn import spawn
from trainer.batching import BatchPlan
from trainer.data import prepare
from trainer.data.loader import EvalData, TrainData
from trainer.deepspeed_config import deepspeed_config
from trainer.engine import Engine
from trainer.model.config import largest_weight
from trainer.model.translation import translate
from trainer.sections import Recipe

STEPS, S = 3, 48  # steps; tokens of half a row
MARIAN = {
    "vocab_size": 257,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": S,
    "scale_embedding": True,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.1,
}
SEPARATE = {"share_encoder_decoder_embeddings": False, "attention_dropout": 0.1}


@dataclass(frozen=True)
class Case:
    layout: Layout
    stage: int = 1
    sequence_parallel: bool | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"


CASES = {
    "dp2-zero3": Case(Layout(dp=2), stage=3),
    "tp2": Case(Layout(tp=2)),
    "tp2-all-tokens": Case(Layout(tp=2), stage=0, sequence_parallel=False, recompute="full"),
    "pp2": Case(Layout(pp=2)),
    "pp2-interleaved": Case(Layout(pp=2), stage=0, schedule={"schedule": "interleaved_1f1b", "virtual_stages": 2}),
    "tp2xpp2": Case(Layout(tp=2, pp=2), recompute="selective"),
    "dp2-zero1": Case(Layout(dp=2)),
    "pp2xdp2-zero3": Case(Layout(pp=2, dp=2), stage=3),
    "tp2xdp2-zero2": Case(Layout(tp=2, dp=2), stage=2),
}
EVERY_DAY = {"dp2-zero3", "tp2", "pp2", "tp2xpp2"}


def recipe_of(folder: Path, case: Case) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"family": "marian"},
            "data": {
                "task": "translate",
                "sources": [{"path": str(folder / "pairs.jsonl")}],
                "seq_len": S,
                "eval_fraction": 0.2,
                "workers": 1,
            },
            "parallel": {
                "tensor": case.layout.tp,
                "pipeline": case.layout.pp,
                "sequence_parallel": case.sequence_parallel,
                **case.schedule,
            },
            "batch": {"global_sequences": 8, "micro_sequences": 2},
            "zero": {"stage": case.stage, **({"stage3_param_persistence_threshold": 100} if case.stage == 3 else {})},
            "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01},
            "train": {"clip_norm": 0.3, "label_smoothing": 0.1, "recompute": case.recompute},
        }
    )


def train(mesh: Mesh, folder: Path, case: Case, config: dict[str, Any]) -> dict[str, Any]:
    recipe = recipe_of(folder, case)
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    network = translate("marian", {**MARIAN, **config})
    engine = Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=largest_weight(network)),
        fill=lambda block: initialise(block, seed=0),
    )
    found = prepare(
        recipe.data, seed=0, cache_dir=folder / "cache", build=mesh.rank == 0, progress=lambda done, total, what: None
    )
    cut = {"seq_len": recipe.data.row_tokens, "isolate_documents": True}
    data = TrainData(found.train, found.weights, **cut, seed=0, global_sequences=8)
    held_out = EvalData(found.evaluation, **cut, sequences=5)
    place = {"dp_rank": mesh.dp.rank, "dp": mesh.dp.size, "micro_sequences": 2}
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
        "evaluation": [evaluation.loss, evaluation.num_targets],
        "learned": learned,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": "um " * (i % 5) + f"{i}", "target": f"{i} " + "so " * (i % 7)} for i in range(150)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, Any]]:
    alone = {name: spawn(train, Layout(), folder, Case(Layout()), config)[0] for name, config in CONFIGS.items()}
    in_rows = [row for step in alone["shared"]["learned"] for batch in step for row in batch]
    assert len(set(in_rows)) > 3, "the rows must differ in their numbers of targets"
    return alone


CONFIGS: dict[str, dict[str, Any]] = {"shared": {}, "separate": SEPARATE}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        pytest.param(name, ends, marks=[] if name in EVERY_DAY and (ends == "shared" or name == "pp2") else pytest.mark.grid)
        for name in CASES
        for ends in CONFIGS
    ],
)
def test_every_layout_is_the_same_training(name: str, ends: str, folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    alone = expected[ends]
    for got in spawn(train, CASES[name].layout, folder, CASES[name], CONFIGS[ends]):
        assert got["targets"] == alone["targets"]
        # fp32 sums in another order, as in the other parity tests.
        for key in ("loss", "norm", "evaluation"):
            np.testing.assert_allclose(got[key], alone[key], rtol=2e-6, err_msg=key)
        for weight_name, weight in got["weights"].items():
            np.testing.assert_allclose(weight, alone["weights"][weight_name], rtol=0, atol=1e-6, err_msg=weight_name)
