"""The parity check can fail: mistakes that others have made, switched on one by one, must each be caught.

Each mutation changes one thing inside the ranks and is named after what went wrong. The check is the one of
`test_engine_parity`: losses, norms and SGD-updated weights against the one-process run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trainer.engine
from parallel.mesh import Mesh
from parallel.rng import derive_seed
from parallel.topology import Layout
from tests.parallel.test_engine_parity import Case, Outcome, assert_same_training, outcome, run_case
from tests.spawn import spawn
from trainer.batching import BatchPlan
from trainer.engine import Engine


def mean_of_micro_batch_means() -> None:
    """Each micro-batch divides by its own targets (transformers#34191)."""
    forward = Engine._forward
    BatchPlan.loss_factor = lambda plan, num_targets: 1.0 / plan.num_micro_batches
    Engine._forward = lambda engine, batch: forward(engine, batch) / batch.num_targets


def forgotten_data_parallel_degree() -> None:
    """DeepSpeed averages over ranks; the factor must undo it."""
    BatchPlan.loss_factor = lambda plan, num_targets: 1.0 / num_targets


def divided_twice_by_accumulation() -> None:
    """The schedule, or the engine, divides once more (torchtitan#2972)."""
    BatchPlan.loss_factor = lambda plan, num_targets: plan.dp / num_targets / plan.num_micro_batches


def targets_of_this_rank_only() -> None:
    """The number of targets is not summed over ranks."""
    Engine._total = lambda engine, count: count


def last_micro_batch_only() -> None:
    """Accumulation is lost: only the boundary's gradient counts (seen with ZeRO-3 and manual backward hooks)."""
    backward = Engine._backward

    def only_at_the_boundary(engine: Engine, loss: torch.Tensor, scale: float) -> None:
        boundary = engine.deepspeed.is_gradient_accumulation_boundary()
        backward(engine, loss if boundary else loss * 0.0, scale)

    Engine._backward = only_at_the_boundary


def no_clipping() -> None:
    """The recipe's clip_norm never reaches the update (mlcommons/training#723)."""
    initialise = Engine.__init__

    def unclipped(engine: Engine, *args: Any, deepspeed_config: dict[str, Any], **more: Any) -> None:
        initialise(engine, *args, deepspeed_config={**deepspeed_config, "gradient_clipping": 0.0}, **more)

    Engine.__init__ = unclipped


def weight_decay_on_everything() -> None:
    """Norms, biases and embeddings decay too."""
    make = trainer.engine.make_optimizer

    def decaying(*args: Any) -> torch.optim.Optimizer:
        optimizer = make(*args)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01
        return optimizer

    trainer.engine.make_optimizer = decaying


def mutated(mesh: Mesh, mutate: Callable[[], None], case: Case) -> Outcome:
    mutate()
    return run_case(mesh, case)


MUTATIONS = [
    mean_of_micro_batch_means,
    forgotten_data_parallel_degree,
    divided_twice_by_accumulation,
    targets_of_this_rank_only,
    last_micro_batch_only,
    no_clipping,
    weight_decay_on_everything,
]


@pytest.fixture(scope="module")
def honest() -> Outcome:
    return outcome(Case(clip_norm=0.3, steps=2))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_parity_check_catches(mutate: Callable[[], None], stage: int, honest: Outcome) -> None:
    case = Case(dp=2, accumulation=2, stage=stage, clip_norm=0.3, steps=2)
    got = spawn(mutated, Layout(dp=2), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, honest, relative=2e-6, weights=1e-6)


def dropout_by_rank() -> None:
    """Masks drawn from a stream of the rank instead of the sequence's place in the step."""
    trainer.engine.derive_seed = lambda *names: derive_seed(*names, torch.distributed.get_rank())


def test_the_dropout_check_catches_masks_that_follow_the_rank() -> None:
    expected = outcome(Case(accumulation=4, dropout_in_gpt2=True, steps=2))
    got = spawn(mutated, Layout(dp=4), dropout_by_rank, Case(dp=4, dropout_in_gpt2=True, steps=2))[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, expected, relative=2e-6, weights=1e-6)
