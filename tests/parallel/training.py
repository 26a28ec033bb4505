"""Trainings of a small model on spawned ranks, and what two of them must have in common.

Every layout draws the same tokens, and the targets are uneven on purpose (row r of a step has a share r/8 of its labels
masked), so a mean of micro-batch means differs from the step's mean in the second digit.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from parallel.documents import Documents
from parallel.gather import logical_tensors
from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe
from trainer.verify.rank import in_float64

G, S, V = 8, 16, 67
SHAPES = {"gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": S}}
LLAMA = SHAPES["llama"] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ADAMW = {"name": "adamw", "lr": 1e-3}
CPU = {"offload_optimizer": {"device": "cpu"}}
CPU_ALL = {**CPU, "offload_param": {"device": "cpu"}}
OFFLOADS = {"zero1-cpu": (1, CPU), "zero2-cpu": (2, CPU), "zero3-cpu": (3, CPU_ALL), "zero3": (3, {}), "zero1": (1, {})}
FOUR_LAYERS = {"num_hidden_layers": 4}
UNTIED = {**FOUR_LAYERS, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Case:
    """What a run of the small model differs in."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool | None = None
    accumulation: int = 1
    stage: int = 0
    sequences: int = 8
    steps: int = 3
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "sgd", "lr": 0.1})
    clip_norm: float = 0.0
    dtype: str = "fp32"
    loss_scale: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    compile: bool | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    new_tokens: tuple[int, ...] = ()
    poison_step: int | None = None
    poisoned_rank: int = 0

    def recipe(self) -> Recipe:
        if self.dtype == "fp64":  # which no recipe may ask for
            return in_float64(replace(self, dtype="fp32").recipe())
        # A threshold of 100 elements makes ZeRO-3 divide even this small model's matrices.
        persistence = {"stage3_param_persistence_threshold": 100} if self.stage == 3 else {}
        return Recipe.model_validate(
            {
                "model": {"family": self.family},
                "data": {"seq_len": S},
                "parallel": {
                    "tensor": self.tp,
                    "sequence_parallel": self.sequence_parallel,
                    "pipeline": self.pp,
                    "schedule": self.schedule,
                    "virtual_stages": self.virtual_stages,
                },
                "batch": {
                    "global_sequences": self.sequences,
                    "micro_sequences": self.sequences // self.dp // self.accumulation,
                },
                "precision": {"dtype": self.dtype, "loss_scale": self.loss_scale},
                "zero": {"stage": self.stage, **persistence, **self.zero},
                "optimizer": {"weight_decay": 0.01, **self.optimizer},
                "train": {
                    "steps": max(1, self.steps),
                    "clip_norm": self.clip_norm,
                    "recompute": self.recompute,
                    "compile": self.compile,
                },
                "tuning": self.tuning,
            }
        )


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    scales: list[float]
    skipped: list[bool]
    targets: list[int]
    eval_loss: float
    weights: dict[str, np.ndarray]
    initial_hash: str  # of the logical weights before the first step
    local_hash: str  # of this rank's weights after the last
    notes: list[str]


def rows_of_step(step: int, rows: int = G) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and labels [rows, S] of a step, the same in every layout."""
    stream = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, V, (rows, S + 1), generator=stream)
    masked = torch.rand(rows, S, generator=stream) < torch.arange(rows)[:, None] / rows
    return tokens[:, :-1].contiguous(), tokens[:, 1:].masked_fill(masked, IGNORE)


def make_engine(mesh: Mesh, case: Case) -> Engine:
    recipe = case.recipe()
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the test")
    network = replace(from_hf(case.family, {**SHAPES[case.family], **case.config}), new_tokens=case.new_tokens)
    return Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=network.largest_weight),
        fill=fill_in_float64 if case.dtype == "fp64" else fill,
    )


def fill(block: torch.nn.Module) -> None:
    initialise(block, seed=0)


def fill_in_float64(block: torch.nn.Module) -> None:
    """The same values as in fp32."""
    fill(block)
    block.double()


def run_case(mesh: Mesh, case: Case) -> Outcome:
    engine = make_engine(mesh, case)
    plan = engine.plan
    initial_hash = hashed(whole_weights(engine))
    results = []
    for step in range(case.steps):
        if step == case.poison_step and mesh.rank == case.poisoned_rank:
            poison(engine)
        results.append(engine.step(micro_batches(mesh, plan, step), step=step, lr=case.optimizer["lr"]))
    evaluation = engine.evaluator.evaluate(iter(micro_batches(mesh, plan, step=99)))
    weights = whole_weights(engine)
    local_hash = hashed({spec.pieces[0].name: in_numpy(p) for spec, p in engine.local_tensors() if spec.pieces})
    engine.close()
    return Outcome(
        [r.loss for r in results],
        [r.grad_norm for r in results],
        [r.loss_scale for r in results],
        [r.skipped for r in results],
        [r.num_targets for r in results],
        evaluation.loss,
        weights,
        initial_hash,
        local_hash,
        engine.notes,
    )


def whole_weights(engine: Engine) -> dict[str, np.ndarray]:
    """The logical tensors, put together on the first rank."""
    return {name: in_numpy(weight) for name, weight in logical_tensors(engine.gathered_tensors()).items()}


def in_numpy(weight: torch.Tensor) -> np.ndarray:
    """bf16, which numpy lacks, as fp32."""
    return (weight if weight.dtype == torch.float64 else weight.float()).numpy()


def hashed(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    return digest.hexdigest()


def micro_batches(mesh: Mesh, plan: BatchPlan, step: int) -> list[MicroBatch]:
    tokens, labels = rows_of_step(step, plan.global_sequences)
    first = mesh.data.rank * plan.sequences_per_rank
    starts = range(first, first + plan.sequences_per_rank, plan.micro_sequences)
    rows = [slice(start, start + plan.micro_sequences) for start in starts]
    return [MicroBatch(tokens[r], Documents(((S - 5, 5),) * plan.micro_sequences), labels[r]) for r in rows]


def poison(engine: Engine) -> None:
    """Make one element of one gradient NaN, once, on this rank only; of a parameter that this rank owns."""
    parameter = [parameter for parameter, spec in engine.specs if spec.owned][-1]

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        grad = grad.clone()
        grad.view(-1)[0] = math.nan
        return grad

    handle = parameter.register_hook(spoil)


def outcome(case: Case) -> Outcome:
    """Every rank's numbers must be the same; those of rank 0, which has the weights, are returned."""
    layout = Layout(dp=case.dp, tp=case.tp, pp=case.pp)
    ranks = spawn(run_case, layout, case)
    for rank, other in enumerate(ranks):
        assert other.losses == ranks[0].losses
        assert other.norms == ranks[0].norms
        assert other.local_hash == ranks[layout.peers(rank, "dp")[0]].local_hash, f"rank {rank} is no replica"
    return ranks[0]


def assert_same_training(got: Outcome, expected: Outcome, *, relative: float, weights: float) -> None:
    np.testing.assert_allclose(got.losses, expected.losses, rtol=relative)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=relative)
    np.testing.assert_allclose(got.eval_loss, expected.eval_loss, rtol=relative)
    assert got.targets == expected.targets
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(got.weights[name], weight, rtol=0, atol=weights, err_msg=name)


def reference(case: Case) -> Case:
    """The same training in one process."""
    return replace(case, pp=1, dp=1, tp=1, stage=0, zero={}, schedule="1f1b", virtual_stages=1, accumulation=1)


_seen: dict[str, Outcome] = {}


def in_one_process(case: Case) -> Outcome:
    """Return the outcome of the same training in one process. It is run once for all who ask."""
    alone = reference(case)
    return _seen.get(repr(alone)) or _seen.setdefault(repr(alone), outcome(alone))


def assert_equals_one_process(case: Case, *, relative: float = 2e-6, weights: float = 1e-6) -> Outcome:
    """fp32 sums in another order: seen 3e-8 in the loss, 2e-7 in the norm, 1.2e-7 in the weights."""
    expected, got = in_one_process(case), outcome(case)
    assert got.initial_hash == expected.initial_hash
    assert_same_training(got, expected, relative=relative, weights=weights)
    return got
