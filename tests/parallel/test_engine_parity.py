"""The engine against one process: gradients, norms, losses and updated weights at every ZeRO stage.

SGD shows the gradient itself in the weights: a gradient that is scaled twice or not at all changes them, while Adam would
hide it. The targets are uneven on purpose (row r of a step has a share r/8 of its labels masked), so a mean of
micro-batch means differs from the step's mean in the second digit.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.gather import logical_tensors
from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.model.config import largest_weight
from trainer.model.hf_config import translate
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
                "train": {"steps": max(1, self.steps), "clip_norm": self.clip_norm, "recompute": self.recompute},
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
    network = replace(translate(case.family, {**SHAPES[case.family], **case.config}), new_tokens=case.new_tokens)
    return Engine(
        recipe,
        plan,
        network,
        mesh,
        torch.device("cpu"),
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=largest_weight(network)),
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
    first = mesh.dp.rank * plan.sequences_per_rank
    starts = range(first, first + plan.sequences_per_rank, plan.micro_sequences)
    rows = [slice(start, start + plan.micro_sequences) for start in starts]
    return [MicroBatch(tokens[r], labels[r], ((S - 5, 5),) * plan.micro_sequences) for r in rows]


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


NAN_EVERY_DAY = {(0, "fp16"), (1, "bf16"), (2, "fp32"), (3, "bf16")}
LAYOUTS = [(dp, accumulation) for dp in (1, 2, 4) for accumulation in (1, 4) if dp * accumulation <= G]


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["unclipped", "clipped"])
def reference(request: pytest.FixtureRequest) -> tuple[float, Outcome]:
    expected = outcome(Case(clip_norm=request.param))
    assert all(norm > 0.5 for norm in expected.norms), "clipping at 0.3 must be active"
    return request.param, expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dp", "accumulation"),
    [pytest.param(*layout, marks=[] if layout in {(1, 4), (2, 4)} else [pytest.mark.grid]) for layout in LAYOUTS],
)
def test_sgd_equals_one_process(dp: int, accumulation: int, stage: int, reference: tuple[float, Outcome]) -> None:
    clip_norm, expected = reference
    got = outcome(Case(dp=dp, accumulation=accumulation, stage=stage, clip_norm=clip_norm))
    # fp32 sums of up to 8 sequences in another order: seen 2e-7 relative in the loss and norm, 1e-8 in the weights.
    assert_same_training(got, expected, relative=2e-6, weights=1e-6)


OFFLOADS = {
    "zero1-cpu": (1, {"offload_optimizer": {"device": "cpu"}}),
    "zero2-cpu": (2, {"offload_optimizer": {"device": "cpu"}}),
    "zero3-cpu": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    "zero3": (3, {}),
    "zero1": (1, {}),
}
ADAMW = {"name": "adamw", "lr": 1e-3}


@pytest.mark.parametrize("name", OFFLOADS)
def test_adamw_and_offload_equal_one_process(name: str, adamw_reference: Outcome) -> None:
    stage, zero = OFFLOADS[name]
    got = outcome(Case(dp=2, accumulation=2, stage=stage, zero=zero, optimizer=ADAMW, steps=6, clip_norm=0.3))
    # Adam divides by the root of small second moments, which magnifies rounding: seen 2e-7.
    assert_same_training(got, adamw_reference, relative=2e-6, weights=2e-6)


@pytest.fixture(scope="module")
def adamw_reference() -> Outcome:
    return outcome(Case(optimizer=ADAMW, steps=6, clip_norm=0.3))


def test_nvme_offload_changes_no_bit_and_really_swaps(tmp_path: Path) -> None:
    # A rank's share must exceed 1 MiB, or DeepSpeed keeps it in memory.
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    case = Case(dp=2, stage=3, optimizer=ADAMW, config=wide, zero={"offload_optimizer": on_disk, "offload_param": on_disk})
    got = outcome(case)
    in_memory = outcome(Case(dp=2, stage=3, optimizer=ADAMW, config=wide))
    assert got.losses == in_memory.losses
    for name, weight in in_memory.weights.items():
        np.testing.assert_array_equal(got.weights[name], weight, err_msg=name)
    swapped = sum(path.stat().st_size for path in tmp_path.rglob("*.swp"))
    # fp32 master weights and two moments of a 1.6 M parameter model.
    assert swapped > 10e6, f"only {swapped} bytes in {tmp_path}"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_equals_its_one_process_run(dtype: str, stage: int, half_reference: dict[str, Outcome]) -> None:
    got = outcome(Case(dp=2, accumulation=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=4))
    expected = half_reference[dtype]
    # The micro-batches' matrix products have other shapes, so bf16 (8 bits) and fp16 (11 bits) round them differently: seen
    # 5e-4 and 3e-5 in the norms. A weight may take AdamW's early steps of lr the other way (fp16: seen 5e-4), and bf16
    # holds norm weights near 1 in steps of 2^-8.
    relative, weights = {"bf16": (1e-3, 5e-3), "fp16": (1e-4, 2e-3)}[dtype]
    assert_same_training(got, expected, relative=relative, weights=weights)
    # Rounding averages out over a step's targets: seen 3e-5 and 1.4e-6.
    np.testing.assert_allclose(got.losses, expected.losses, rtol=relative / 10)


@pytest.fixture(scope="module")
def half_reference() -> dict[str, Outcome]:
    return {dtype: outcome(Case(dtype=dtype, optimizer=ADAMW, steps=4)) for dtype in ("bf16", "fp16")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_accumulates_in_fp32(stage: int) -> None:
    """Sixty-four equal micro-batches sum to 64 times one: in bf16 the sum would stall at 8 bits."""
    got = spawn(accumulate_many, Layout(dp=1), stage)[0]
    # One micro-batch's gradient is a bf16 product, the sum of 64 copies is exact in fp32 (a power of two).
    np.testing.assert_allclose(got[1], got[0], rtol=1e-6)


def accumulate_many(mesh: Mesh, stage: int) -> tuple[float, float]:
    norms = []
    for copies in (1, 64):
        case = Case(stage=stage, dtype="bf16", accumulation=1)
        recipe = case.recipe().model_copy(update={"batch": {"global_sequences": copies, "micro_sequences": 1}})
        recipe = Recipe.model_validate(recipe.model_dump())
        plan = BatchPlan.from_recipe(recipe, 1, "the test")
        network = translate("llama", LLAMA)
        engine = Engine(
            recipe,
            plan,
            network,
            mesh,
            torch.device("cpu"),
            deepspeed_config=deepspeed_config(recipe, plan),
            fill=lambda block: initialise(block, seed=0),
        )
        tokens, labels = rows_of_step(0)
        batch = MicroBatch(tokens[:1], labels[:1], ((S,),))
        norms.append(engine.step([batch] * copies, step=0, lr=0.1).grad_norm)
        engine.close()
    return norms[0], norms[1]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(stage, dtype, marks=[] if (stage, dtype) in NAN_EVERY_DAY else [pytest.mark.grid])
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16", "fp16")
    ],
)
def test_a_nan_on_one_rank_skips_the_step_everywhere(stage: int, dtype: str) -> None:
    case = Case(dp=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=3, poison_step=2)
    poisoned, untouched = outcome(case), outcome(Case(dp=2, stage=stage, dtype=dtype, optimizer=ADAMW, steps=2))
    assert poisoned.skipped == [False, False, True]
    assert poisoned.norms[2] == math.inf
    for name, weight in untouched.weights.items():
        np.testing.assert_array_equal(poisoned.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_scale_halves_doubles_and_never_changes_an_update(stage: int) -> None:
    """With window 2 the scale doubles at every second good step; the update of that step must not be halved or doubled."""
    scaled = Case(stage=stage, dtype="fp16", steps=6, loss_scale={"initial_power": 8, "window": 2})
    got, expected = outcome(scaled), outcome(Case(stage=stage, dtype="fp16", steps=6, loss_scale={"static": 256.0}))
    assert got.scales == [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0]
    # Powers of two scale fp16 exactly; only values that were subnormal at the lower scale differ.
    assert_same_training(got, expected, relative=1e-4, weights=5e-4)


def test_dropout_does_not_depend_on_ranks_accumulation_or_recompute() -> None:
    """Masks follow the sequence's place in the step and the token's in the sequence."""
    cases = [
        Case(dp=dp, tp=tp, sequence_parallel=sequence, accumulation=accumulation, stage=stage, recompute=mode, family="gpt2")
        for dp, tp, sequence, accumulation, stage, mode in (
            (1, 1, None, 4, 0, "none"),
            (1, 1, None, 4, 0, "full"),
            (1, 1, None, 4, 0, "selective"),
            (1, 1, None, 1, 0, "none"),
            (2, 1, None, 2, 1, "full"),
            (4, 1, None, 1, 3, "none"),
            (1, 2, False, 4, 0, "selective"),
            (1, 2, True, 4, 2, "full"),
            (2, 2, True, 1, 3, "none"),
        )
    ]
    expected, *others = (outcome(case) for case in cases)
    for got in others:
        assert_same_training(got, expected, relative=2e-6, weights=1e-6)
    for recomputed in others[:2]:
        assert recomputed.losses == expected.losses, "recompute alone must not change one bit"


@pytest.mark.parametrize(
    ("stage", "tp"),
    [
        pytest.param(stage, tp, marks=[] if (stage, tp) in {(3, 2)} else [pytest.mark.grid])
        for stage in (0, 1, 2, 3)
        for tp in (1, 2)
    ],
)
def test_recompute_changes_nothing(stage: int, tp: int) -> None:
    kept, *recomputed = (outcome(Case(dp=2, tp=tp, stage=stage, recompute=mode)) for mode in ("none", "selective", "full"))
    for got in recomputed:
        assert got.losses == kept.losses
        for name, weight in kept.weights.items():
            np.testing.assert_array_equal(got.weights[name], weight, err_msg=name)
