"""Learning from pairs: against the papers' formulas with whole logits in transformers, and every layout against one process.

The rows hold different numbers of pairs, the answers different numbers of tokens, and the reference is computed by each layout
for itself.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.parallel.training import LLAMA, whole_weights
from tests.spawn import spawn
from trainer.data import prepare
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import write_folder
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.reference import with_reference
from trainer.schema import Recipe

STEPS, S, G = 20, 128, 4
LR, CLIP = 0.0005, 0.3
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
CPU_ALL = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@dataclass(frozen=True)
class Case:
    layout: Layout = field(default_factory=Layout)
    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 0})
    preference: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    steps: int = STEPS

    def recipe(self, folder: Path) -> Recipe:
        # A threshold of 100 elements makes ZeRO-3 divide even this small model's matrices.
        persistence = {"stage3_param_persistence_threshold": 100} if self.zero["stage"] == 3 else {}
        return Recipe.model_validate(
            {
                "model": {"family": "llama"},
                "data": {
                    "task": "preference",
                    "sources": [{"path": str(folder / "pairs.jsonl")}],
                    "seq_len": S,
                    "eval_fraction": 0.2,
                    "workers": 1,
                },
                "parallel": {"tensor": self.layout.tp, "pipeline": self.layout.pp, **self.schedule},
                "batch": {"global_sequences": G, "micro_sequences": 1 if self.layout.dp > 1 or self.layout.pp > 1 else 2},
                "precision": {"dtype": self.dtype},
                "zero": {**persistence, **self.zero},
                "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.0},
                "train": {"clip_norm": CLIP},
                "preference": {"beta": 0.5, **self.preference},
                "tuning": self.tuning,
            }
        )


Row = tuple[np.ndarray, np.ndarray, tuple[int, ...]]  # tokens and labels [S], lengths of the documents


@dataclass(frozen=True)
class Outcome:
    steps: dict[str, list[float]]  # by what was measured
    targets: list[int]
    evaluation: dict[str, float]
    weights: dict[str, np.ndarray]
    rows: list[list[Row]]  # of each step


def train(mesh: Mesh, case: Case, folder: Path) -> Outcome:
    recipe = case.recipe(folder)
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    network = from_hf("llama", {**LLAMA, "vocab_size": 257, "max_position_embeddings": S, "num_hidden_layers": 4})
    engine = Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=network.largest_weight),
        fill=lambda block: initialise(block, seed=0),
    )

    def silent(done: int, total: int, what: str) -> None: ...

    found = prepare(recipe.data, seed=0, cache_dir=folder / "cache", build=mesh.rank == 0, progress=silent)
    if recipe.needs_reference:
        found = with_reference(found, engine, folder=folder, origin=None, writes=False, progress=silent)
    if mesh.layout.world_size == 1 and not (folder / "base").exists() and not case.tuning:
        config = to_hf(network, dtype="float32", eos_token_id=None)
        write_folder(
            engine.gathered_tensors(), folder / "base", dtype=torch.float32, config=config, save_beside=lambda folder: None
        )
    data = TrainData(found.train, found.weights, row_tokens=S, seed=0, isolate_documents=True, global_sequences=G)
    held_out = EvalData(found.evaluation, row_tokens=S, isolate_documents=True, sequences=5)
    place = {"dp_rank": mesh.data.rank, "dp": mesh.data.size, "micro_sequences": plan.micro_sequences}
    results, batches = [], []
    for step in range(case.steps):
        batches.append(list(data.micro_batches(step, **place, read=engine.execution.reads_tokens)))
        results.append(engine.step(batches[-1], step=step, lr=LR))
    evaluation = engine.evaluator.evaluate(held_out.micro_batches(**place))
    weights = whole_weights(engine)
    engine.close()
    return Outcome(
        {
            "loss": [result.loss for result in results],
            "norm": [result.grad_norm for result in results],
            **{name: [result.statistics[name] for result in results] for name in REWARDS},
        },
        [result.num_targets for result in results],
        engine.measures.record(evaluation),
        weights,
        [[row for batch in step for row in rows_of(batch)] for step in batches],
    )


def rows_of(batch: MicroBatch) -> list[Row]:
    return list(zip(batch.tokens_BS.numpy(), batch.labels_BS.numpy(), batch.documents.lengths, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    rows = [
        {"prompt": f"{i}" + "?" * (i % 13), "chosen": "so " * (i % 9) + "on", "rejected": "no" + "!" * (i % 5)}
        for i in range(90)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Outcome:
    (alone,) = spawn(train, Layout(), Case(), folder)
    assert len({len(documents) for step in alone.rows for _, _, documents in step}) > 1, "rows must differ"
    assert alone.steps["norm"][0] > CLIP, "clipping must be active"
    assert abs(alone.steps["rewards/margins"][0]) < 1e-6, "the model is its own reference at the start"
    return alone


# ------------------------------------------------------------------------------------------------ the papers' formulas


def by_formula(folder: Path, steps: list[list[Row]], loss_of: Any) -> tuple[list[list[float]], dict[str, Tensor]]:
    """(loss, reward of chosen, of rejected, share of pairs in order) of each step, and the weights at the end: each document a
    row of its own, logits whole, the reference a second model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    reference = copy.deepcopy(model).requires_grad_(False)
    rule = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def token_log_probs(network: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        log_probs = network(input_ids=tokens[None]).logits[0].log_softmax(-1)
        is_target = labels != IGNORE
        return log_probs[is_target].gather(-1, labels[is_target][:, None])[:, 0]

    records = []
    for rows in steps:
        of_pairs = []
        for tokens, labels, lengths in rows:
            spans = [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))]
            answers = [(torch.from_numpy(tokens[span]), torch.from_numpy(labels[span])) for span in spans]
            for pair in zip(answers[::2], answers[1::2], strict=False):  # a last one without partner is filler
                of_pairs.append(loss_of(*(token_log_probs(network, *a) for network in (model, reference) for a in pair)))
        losses_of_pairs, chosen, rejected = (torch.stack(column) for column in zip(*of_pairs, strict=True))
        loss = losses_of_pairs.mean()
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rule.step()
        parts = (loss, chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).float().mean())
        records.append([part.item() for part in parts])
    return records, model.state_dict()


def dpo(chosen: Tensor, rejected: Tensor, of_chosen: Tensor, of_rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """−log σ(β (log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x))): Rafailov et al. 2023, equation 7."""
    rewards = 0.5 * (chosen.sum() - of_chosen.sum()), 0.5 * (rejected.sum() - of_rejected.sum())
    return -functional.logsigmoid(rewards[0] - rewards[1]), *rewards


def orpo(chosen: Tensor, rejected: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_SFT − λ log σ(log odds(y_w|x) / odds(y_l|x)), odds = P / (1 − P), P = exp(mean log-probability): Hong et al. 2024,
    equations 3 to 7."""
    p, q = chosen.mean().exp(), rejected.mean().exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -chosen.mean() - 0.5 * functional.logsigmoid(ratio.log()), 0.5 * p.log(), 0.5 * q.log()


@pytest.mark.parametrize(("name", "loss_of"), [("dpo", dpo), ("orpo", orpo)])
def test_twenty_steps_equal_those_of_the_formula(name: str, loss_of: Any, folder: Path, one_process: Outcome) -> None:
    got = one_process if name == "dpo" else spawn(train, Layout(), Case(preference={"loss": name}), folder)[0]
    expected, weights = by_formula(folder, got.rows, loss_of)
    assert abs(expected[-1][0] - expected[0][0]) > 0.1, "training changes nothing that could be compared"
    columns = [got.steps[key] for key in ("loss", *REWARDS)]
    # fp32, two implementations of one network; rewards are differences of sums of log-probabilities, and begin at 0.
    np.testing.assert_allclose(np.array(columns).T, expected, rtol=1e-5, atol=1e-5)
    for key, weight in got.weights.items():
        np.testing.assert_allclose(weight, weights[key], rtol=0, atol=1e-5, err_msg=key)


# ------------------------------------------------------------------------------------------------ layouts

LAYOUTS = {
    "tp2": Case(Layout(tp=2)),
    "tp2-whole-tokens": Case(Layout(tp=2), schedule={"sequence_parallel": False}),
    "pp2": Case(Layout(pp=2)),
    "tp2xpp2": Case(Layout(tp=2, pp=2), {"stage": 1}),
    "split-backward": Case(Layout(pp=2), {"stage": 2}, schedule={"schedule": "zbv", "virtual_stages": 2}),
    "dp2-zero0": Case(Layout(dp=2)),
    "dp2-zero1": Case(Layout(dp=2), {"stage": 1}),
    "dp2-zero2": Case(Layout(dp=2), {"stage": 2}),
    "dp2-zero3": Case(Layout(dp=2), {"stage": 3}),
    "dp2-zero3-cpu": Case(Layout(dp=2), {"stage": 3, **CPU_ALL}),
    "pp2xdp2-zero3": Case(Layout(pp=2, dp=2), {"stage": 3}),
}
EVERY_DAY = {"tp2xpp2", "dp2-zero1"}


def assert_same(got: Outcome, expected: Outcome, *, relative: float, weights: float) -> None:
    assert got.targets == expected.targets[: len(got.targets)]
    for name, values in got.steps.items():
        np.testing.assert_allclose(values, expected.steps[name], rtol=relative, atol=relative, err_msg=name)
    for name, value in got.evaluation.items():
        np.testing.assert_allclose(value, expected.evaluation[name], rtol=relative, atol=relative, err_msg=name)
    for name, weight in got.weights.items():
        np.testing.assert_allclose(weight, expected.weights[name], rtol=0, atol=weights, err_msg=name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.grid]) for name in LAYOUTS]
)
def test_every_layout_prefers_alike(name: str, folder: Path, one_process: Outcome) -> None:
    case = LAYOUTS[name]
    for got in spawn(train, case.layout, case, folder):
        # fp32 sums in another order, and Adam divides by the root of small second moments.
        assert_same(got, one_process, relative=1e-5, weights=1e-5)


@pytest.mark.parametrize(
    "preference",
    [
        {"loss": "orpo"},
        *(pytest.param(keys, marks=pytest.mark.grid) for keys in ({"loss": "ipo", "beta": 0.2}, {"label_smoothing": 0.1})),
    ],
    ids=str,
)
def test_other_losses_are_divided_alike(preference: dict[str, Any], folder: Path) -> None:
    case = Case(preference=preference, steps=4)
    (expected,) = spawn(train, Layout(), case, folder)
    for got in spawn(train, Layout(tp=2, pp=2), replace(case, layout=Layout(tp=2, pp=2), zero={"stage": 1}), folder):
        assert_same(got, expected, relative=1e-5, weights=1e-5)


def test_an_adapter_learns_to_prefer(folder: Path) -> None:
    """Its reference is the frozen model: both are one at the start, where B is 0."""
    case = Case(tuning={"method": "lora", "rank": 4, "alpha": 8.0})
    (expected,) = spawn(train, Layout(), case, folder)
    assert abs(expected.steps["rewards/margins"][0]) < 1e-6
    assert expected.steps["rewards/margins"][-1] > 0.1
    for got in spawn(train, Layout(tp=2), replace(case, layout=Layout(tp=2), zero={"stage": 2}), folder):
        assert_same(got, expected, relative=1e-5, weights=1e-5)


@pytest.mark.grid
def test_half_precision_learns_to_prefer(folder: Path, one_process: Outcome) -> None:
    """bf16 over both axes: near the fp32 run, as far as 8 bits can be."""
    case = Case(Layout(tp=2), {"stage": 1}, dtype="bf16")
    got = spawn(train, case.layout, case, folder)[0]
    np.testing.assert_allclose(got.steps["loss"], one_process.steps["loss"], atol=0.05)
    assert got.steps["rewards/margins"][-1] > 0.1
