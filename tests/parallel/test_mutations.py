"""The parity check can fail: mistakes that others have made, switched on one by one, must each be caught.

Each mutation changes one thing inside the ranks and is named after what went wrong. The check is the one of
`training`: losses, norms and SGD-updated weights against the one-process run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import trainer.engine.engine
import trainer.engine.execution
from parallel import linear, params, ties
from parallel.collectives import Pending
from parallel.deferred import WeightGradients
from parallel.linear import RowParallelLinear
from parallel.loss import VocabParallelHead
from parallel.mesh import Mesh
from parallel.params import Role, ShardSpec
from parallel.pipeline import Pipeline
from parallel.rng import Streams
from parallel.ties import TiedGradients
from parallel.topology import Layout
from tests.parallel.training import Case, Outcome, assert_same_training, in_one_process, outcome, run_case
from tests.spawn import spawn
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.engine.execution import OneStage
from trainer.engine.zero_pipeline import ZeroInPipeline
from trainer.model import heads, transformer
from trainer.recipe.batch_plan import BatchPlan


def mean_of_micro_batch_means() -> None:
    """Each micro-batch divides by its own targets (transformers#34191)."""
    total = heads.NextToken.loss

    def mean(self: heads.NextToken, output: VocabParallelHead, x_ND: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return total(self, output, x_ND, batch) / batch.num_targets

    BatchPlan.loss_factor = lambda plan, num_targets, averaged_over: 1.0 / plan.num_micro_batches
    heads.NextToken.loss = mean


def forgotten_data_parallel_degree() -> None:
    """DeepSpeed averages over ranks; the factor must undo it."""
    BatchPlan.loss_factor = lambda plan, num_targets, averaged_over: 1.0 / num_targets


def divided_twice_by_accumulation() -> None:
    """The schedule, or the engine, divides once more (torchtitan#2972)."""
    BatchPlan.loss_factor = lambda plan, num_targets, averaged_over: averaged_over / num_targets / plan.num_micro_batches


def targets_of_this_rank_only() -> None:
    """The number of targets is not summed over ranks."""
    Engine._total = lambda engine, count, group: count


def last_micro_batch_only() -> None:
    """Accumulation is lost: only the boundary's gradient counts (seen with ZeRO-3 and manual backward hooks)."""
    backward = OneStage._backward

    def only_at_the_boundary(stage: OneStage, loss: torch.Tensor, scale: float) -> None:
        boundary = stage._engine.is_gradient_accumulation_boundary()
        backward(stage, loss if boundary else loss * 0.0, scale)

    OneStage._backward = only_at_the_boundary


def no_clipping() -> None:
    """The recipe's clip_norm never reaches the update (mlcommons/training#723)."""
    initialise = Engine.__init__

    def unclipped(engine: Engine, *args: Any, deepspeed_config: dict[str, Any], **more: Any) -> None:
        initialise(engine, *args, deepspeed_config={**deepspeed_config, "gradient_clipping": 0.0}, **more)

    Engine.__init__ = unclipped


def weight_decay_on_everything() -> None:
    """Norms, biases and embeddings decay too."""
    make = trainer.engine.engine.make_optimizer

    def decaying(*args: Any, **more: Any) -> torch.optim.Optimizer:
        optimizer = make(*args, **more)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01
        return optimizer

    trainer.engine.engine.make_optimizer = decaying


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


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.grid)])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_parity_check_catches(mutate: Callable[[], None], stage: int, honest: Outcome) -> None:
    case = Case(dp=2, accumulation=2, stage=stage, clip_norm=0.3, steps=2)
    got = spawn(mutated, Layout(dp=2), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, honest, relative=2e-6, weights=1e-6)


# --- tensor and sequence parallelism; the model has dropout, biases, layer norms and a vocabulary that nothing divides


def left_partial(role: Role) -> None:
    """Gradients of replicated parameters with this role stay what this rank's tokens or heads gave."""
    complete = transformer.complete_partial_gradients

    def all_others(block: nn.Module) -> None:
        for module in block.modules():
            for name, spec in getattr(module, "specs", {}).items():
                if spec.role is role:
                    module.specs[name] = replace(spec, partial=False)
        complete(block)

    transformer.complete_partial_gradients = all_others


def norm_gradients_left_partial() -> None:
    """Megatron-LM's sequence-parallel norms need their own reduction."""
    left_partial(Role.NORM)


def bias_gradients_left_partial() -> None:
    """So do biases of row-parallel layers."""
    left_partial(Role.BIAS)


def position_gradients_left_partial() -> None:
    """And learned positions."""
    left_partial(Role.EMBEDDING)


def shared_heads_left_partial() -> None:
    """Two ranks hold a key/value head and each trains it on its own query heads."""
    left_partial(Role.MATRIX)


def unmasked_padding() -> None:
    """The logits of padding rows take part in the softmax."""
    forward = VocabParallelHead.forward

    def unmasked(head: VocabParallelHead, *args: Any, **how: Any) -> torch.Tensor:
        head.vocab_size = head.weight.shape[0] * head.tp.group.size
        return forward(head, *args, **how)

    VocabParallelHead.forward = unmasked


def replicas_counted_on_every_rank() -> None:
    """The gradient norm counts norms and biases once per tensor rank."""
    ShardSpec.owned = property(lambda spec: True)


def shards_counted_on_the_first_rank_only() -> None:
    """The gradient norm misses what other tensor ranks hold."""
    ShardSpec.owned = property(lambda spec: torch.distributed.get_rank() == 0)


def weights_drawn_by_rank() -> None:
    """Each rank draws its own shard instead of slicing the whole tensor."""
    draw = params.draw
    params.draw = lambda name, *more: draw(f"{name}/{torch.distributed.get_rank()}", *more)


def dropout_by_rank() -> None:
    """Masks of replicated activations differ between ranks."""
    of_step = Streams.of_step
    Streams.of_step = lambda seed, *place: of_step(seed + torch.distributed.get_rank(), *place)


def same_mask_for_every_share() -> None:
    """With sequence parallelism all ranks draw the mask of the first share of the tokens."""
    keeps = Streams.keeps_features

    def first_share(streams: Streams, site: str, rate: float, shape: Any, tokens: slice, device: Any) -> torch.Tensor:
        return keeps(streams, site, rate, shape, slice(0, tokens.stop - tokens.start), device)

    Streams.keeps_features = first_share


def input_gradients_not_summed() -> None:
    """A column-parallel layer passes on the gradient of its own features only."""
    linear.start_reduce_scatter = lambda grad, group: Pending(grad.chunk(group.size)[group.rank], None)


def bias_added_by_every_rank() -> None:
    """A row-parallel layer adds its bias before the sum over ranks."""

    def plain(layer: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        return layer.tp.leave(nn.functional.linear(x, layer.weight, layer.bias))

    RowParallelLinear.plain = plain


TENSOR_MUTATIONS = [
    norm_gradients_left_partial,
    bias_gradients_left_partial,
    position_gradients_left_partial,
    unmasked_padding,
    replicas_counted_on_every_rank,
    shards_counted_on_the_first_rank_only,
    weights_drawn_by_rank,
    dropout_by_rank,
    same_mask_for_every_share,
    input_gradients_not_summed,
    bias_added_by_every_rank,
]


def assert_caught(mutate: Callable[[], None], case: Case, expected: Outcome) -> None:
    got = spawn(mutated, Layout(dp=case.dp, tp=case.tp), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, expected, relative=2e-6, weights=1e-6)


GPT2 = Case(family="gpt2", accumulation=2, clip_norm=0.3, steps=2)


@pytest.fixture(scope="module")
def honest_gpt2() -> Outcome:
    return outcome(GPT2)


@pytest.mark.parametrize("stage", [0, 1])
def test_without_a_mutation_nothing_is_caught(stage: int, honest_gpt2: Outcome) -> None:
    got = outcome(replace(GPT2, tp=2, stage=stage))
    assert_same_training(got, honest_gpt2, relative=2e-6, weights=1e-6)


@pytest.mark.parametrize("mutate", TENSOR_MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_parity_check_catches_in_tensor_parallelism(mutate: Callable[[], None], honest_gpt2: Outcome) -> None:
    assert_caught(mutate, replace(GPT2, tp=2, stage=1), honest_gpt2)


def test_the_parity_check_catches_shared_heads_left_partial(honest: Outcome) -> None:
    assert_caught(shared_heads_left_partial, Case(tp=4, clip_norm=0.3, steps=2), honest)


def test_the_dropout_check_catches_masks_that_follow_the_data_rank(honest_gpt2: Outcome) -> None:
    assert_caught(dropout_by_rank, replace(GPT2, dp=2), honest_gpt2)


# --- pipelines; the embedding is tied, gradients are clipped


def ends_not_summed() -> None:
    """The first and the last stage each train their copy of the tied weight on their own gradient."""
    ties.all_reduce = lambda tensor, group: tensor


def ends_counted_twice() -> None:
    """The gradient norm counts both copies of the tied weight."""
    ShardSpec.owned = property(lambda spec: spec.tied or spec.copies.rank == 0)


def later_stages_unmarked() -> None:
    """DeepSpeed counts unmarked parameters on the first rank of a replica only: the norm halves in silence."""
    ShardSpec.owned = property(lambda spec: torch.distributed.get_rank() == 0)


def schedule_divides_once_more() -> None:
    """torch's schedules divide gradients by the number of micro-batches unless told not to."""
    step = Pipeline.step
    Pipeline.step = lambda pipeline, *args, scale: step(pipeline, *args, scale=scale / pipeline.table.num_micro_batches)


def gradients_of_the_last_micro_batch_only() -> None:
    """Every backward starts the sum anew, as DeepSpeed's own prologue makes ZeRO-3 do."""
    accumulating = ZeroInPipeline._accumulating
    ZeroInPipeline._accumulating = lambda zero, number, complete: accumulating(zero, 0, complete)


def boundary_at_every_backward() -> None:
    """The optimizer is told that the sums are complete after each micro-batch."""
    accumulating = ZeroInPipeline._accumulating
    ZeroInPipeline._accumulating = lambda zero, number, complete: accumulating(zero, number, True)


def tied_gradient_forgotten() -> None:
    """What the ends collected is never handed to the optimizer."""
    TiedGradients.totals = lambda gradients: iter(())


def stages_drop_alike() -> None:
    """Dropout masks named after the layer's place in its stage, not in the model."""
    keeps = Streams.keeps_features
    Streams.keeps_features = lambda streams, site, *more: keeps(streams, re.sub(r"\d+", "0", site), *more)


def layer_run_twice() -> None:
    """A block at a cut belongs to both stages."""
    stages_of = trainer.engine.execution.stages_of

    def overlapping(*args: Any) -> list[list[Any]]:
        first, *rest = stages_of(*args)
        return [[*first, rest[0][0]], *rest]

    trainer.engine.execution.stages_of = overlapping


def weight_gradients_lost() -> None:
    """What a split backward left for later is never computed."""
    WeightGradients.take = lambda gradients: lambda: None


PIPELINE_MUTATIONS = [
    (ends_not_summed, {"stage": 1}),
    (ends_counted_twice, {"stage": 1}),
    (later_stages_unmarked, {"stage": 1}),
    (schedule_divides_once_more, {"stage": 0}),
    (gradients_of_the_last_micro_batch_only, {"stage": 3}),
    (boundary_at_every_backward, {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    (tied_gradient_forgotten, {"stage": 1}),
    (stages_drop_alike, {"stage": 0, "family": "gpt2", "config": {"n_layer": 4}}),
    (layer_run_twice, {"stage": 0}),
    (weight_gradients_lost, {"stage": 0, "schedule": "interleaved_zero_bubble", "virtual_stages": 2}),
]


@pytest.mark.parametrize(("mutate", "changes"), PIPELINE_MUTATIONS, ids=[m.__name__ for m, _ in PIPELINE_MUTATIONS])
def test_the_parity_check_catches_in_pipelines(mutate: Callable[[], None], changes: dict[str, Any]) -> None:
    case = Case(pp=2, accumulation=4, clip_norm=0.3, steps=2, **{"config": {"num_hidden_layers": 4}, **changes})
    got = spawn(mutated, Layout(pp=2), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, in_one_process(case), relative=2e-6, weights=1e-6)
