"""Translation in several layouts against one process: the pairs, their targets, losses, norms and updated weights.

Sources and targets differ in length, the numbers of targets of rows and ranks too, labels are smoothed, and SGD shows a
gradient that is scaled by another number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel import ties
from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.messages import Messages
from parallel.params import initialise
from parallel.relative_bias import RelativeBias
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.parallel.training import whole_weights
from tests.spawn import spawn
from trainer.data import prepare
from trainer.data.loader import EvalData, TrainData
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.guard.replicas import disagreements, replicas
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe

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
SEPARATE = {**MARIAN, "share_encoder_decoder_embeddings": False, "attention_dropout": 0.1}
# The encoder has more layers than half of all, so that its table of positions is used in two stages of a pipeline.
T5 = {
    "vocab_size": 257,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
}
# Without dropout attention is one call for many documents; the decoder's table is used in two stages.
T5_GATED = {
    **T5,
    "num_layers": 1,
    "num_decoder_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("marian", MARIAN),
    "separate": ("marian", SEPARATE),
    "t5": ("t5", T5),
    "t5-gated": ("t5", T5_GATED),
}


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
    "pp3-divided": Case(Layout(pp=3), schedule={"balance": [1, 2, 1]}),
}
EVERY_DAY = {
    "shared": {"dp2-zero3", "tp2xpp2"},
    "separate": {"tp2xpp2"},
    "t5": {"dp2-zero3", "tp2", "pp2-interleaved"},
    "t5-gated": set(),
}


def recipe_of(folder: Path, case: Case, family: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"family": family},
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


def train(mesh: Mesh, folder: Path, case: Case, family: str, config: dict[str, Any]) -> dict[str, Any]:
    recipe = recipe_of(folder, case, family)
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    network = from_hf(family, config)
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
    cut = {"row_tokens": recipe.data.row_tokens, "isolate_documents": True}
    data = TrainData(found.train, found.weights, **cut, seed=0, global_sequences=8)
    held_out = EvalData(found.evaluation, **cut, sequences=5)
    place = {"dp_rank": mesh.data.rank, "dp": mesh.data.size, "micro_sequences": 2}
    results, learned = [], []
    for step in range(STEPS):
        batches = list(data.micro_batches(step, **place, read=engine.execution.reads_tokens))
        learned.append([(labels != IGNORE).sum(-1).tolist() for labels in (batch.labels_BS for batch in batches)])
        results.append(engine.step(batches, step=step, lr=0.1))
    evaluation = engine.evaluator.evaluate(held_out.micro_batches(**place))
    held = list(replicas(engine.specs, mesh, engine.zero_stage))
    apart = disagreements(held, Messages.among_all(), engine.device, step=STEPS, lr=0.1)
    weights = whole_weights(engine)
    engine.close()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "targets": [result.num_targets for result in results],
        "evaluation": [evaluation.loss, evaluation.num_targets],
        "learned": learned,
        "apart": apart,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": "um " * (i % 5) + f"{i}", "target": f"{i} " + "so " * (i % 7)} for i in range(150)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str], dict[str, Any]]:
    @cache
    def of(model: str) -> dict[str, Any]:
        alone: dict[str, Any] = spawn(train, Layout(), folder, Case(Layout()), *CONFIGS[model])[0]
        in_rows = [row for step in alone["learned"] for batch in step for row in batch]
        assert len(set(in_rows)) > 3, "the rows must differ in their numbers of targets"
        return alone

    return of


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=[] if name in EVERY_DAY[model] else pytest.mark.grid)
        for model in CONFIGS
        for name in CASES
    ],
)
def test_every_layout_is_the_same_training(
    name: str, model: str, folder: Path, expected: Callable[[str], dict[str, Any]]
) -> None:
    for got in spawn(train, CASES[name].layout, folder, CASES[name], *CONFIGS[model]):
        assert_same(got, expected(model))


def assert_same(got: dict[str, Any], alone: dict[str, Any]) -> None:
    assert (got["targets"], got["apart"]) == (alone["targets"], [])
    # fp32 sums in another order, as in the other parity tests.
    for key in ("loss", "norm", "evaluation"):
        np.testing.assert_allclose(got[key], alone[key], rtol=2e-6, err_msg=key)
    for weight_name, weight in got["weights"].items():
        np.testing.assert_allclose(weight, alone["weights"][weight_name], rtol=0, atol=1e-6, err_msg=weight_name)


# --- mistakes with the tables of relative positions, switched on one by one, must each be caught


def first_heads_on_every_rank() -> None:
    """Each tensor rank adds the bias of the first rank's heads to its own."""
    place = RelativeBias.__init__

    def on_the_first(bias: RelativeBias, *, tp: TensorParallel, **how: Any) -> None:
        place(bias, tp=replace(tp, group=replace(tp.group, rank=0)), **how)

    RelativeBias.__init__ = on_the_first


def tables_not_summed() -> None:
    """Each stage trains its table on the gradient of its own layers."""
    reduce = ties.all_reduce
    ties.all_reduce = lambda grad, group: grad if grad.shape[0] == T5["relative_attention_num_buckets"] else reduce(grad, group)


def mutated(mesh: Mesh, mutate: Callable[[], None], *rest: Any) -> dict[str, Any]:
    mutate()
    return train(mesh, *rest)


@pytest.mark.grid
@pytest.mark.parametrize(("mutate", "name"), [(first_heads_on_every_rank, "tp2"), (tables_not_summed, "pp2-interleaved")])
def test_the_parity_check_catches(
    mutate: Callable[[], None], name: str, folder: Path, expected: Callable[[str], dict[str, Any]]
) -> None:
    got = spawn(mutated, CASES[name].layout, mutate, folder, CASES[name], *CONFIGS["t5"])[0]
    with pytest.raises(AssertionError):
        assert_same(got, expected("t5"))
