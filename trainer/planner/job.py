"""The job of a recipe: what its ranks compute in a step, as the planner times it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.schedules import SCHEDULES
from parallel.topology import Layout
from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.planner.memory import stages_of_ranks
from trainer.planner.states import ITEMSIZE
from trainer.planner.step_time import Job
from trainer.planner.weights import FP32_BYTES, RankWeights, Weight
from trainer.planner.zero_step import ZeroJob
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import schedule_table
from trainer.recipe.stages import stages_of
from trainer.schema import Recipe
from trainer.update_rules import states_of

# Modules of a layer, which stage 3 gives hooks each: the layer, its norms, attention and mlp with
# two linear layers each, and what may do nothing (dropouts, norms of other families).
MODULES_OF_LAYER = 15


def job_of(recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout) -> Job:
    """Return the job of a recipe whose compute format is known."""
    parallel, dtype = recipe.parallel, recipe.precision.settled
    tuned = recipe.tuning.method is not None
    named = parallel.pipeline == 1 or parallel.schedule in SCHEDULES
    return Job(
        network=network,
        layout=layout,
        kernels=None,
        dtype=dtype,
        seq_len=plan.row_tokens,
        micro_sequences=plan.micro_sequences,
        num_micro_batches=plan.num_micro_batches,
        schedule=parallel.schedule,
        virtual_stages=parallel.virtual_stages,
        balance=_layers_of_stages(recipe, network),
        divides_tokens=parallel.divides_tokens,
        recompute=recipe.train.recompute,
        zero_stage=recipe.zero.stage,
        itemsize=ITEMSIZE[dtype],
        # Stage 0 keeps trained weights in fp32, and rounds them where they are used.
        stored_bytes=FP32_BYTES if recipe.zero.stage == 0 and not tuned else ITEMSIZE[dtype],
        trains=not tuned,
        overlaps_sums=parallel.overlap,
        zero=_zero(recipe, plan, network, layout),
        table=None if named else schedule_table(recipe, plan),
    )


def _layers_of_stages(recipe: Recipe, network: TransformerConfig) -> tuple[int, ...]:
    if recipe.parallel.pipeline == 1:
        return ()
    return tuple(sum(block.kind == "layer" for block in blocks) for blocks in stages_of(recipe, network))


def _zero(recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout) -> ZeroJob:
    """Return how DeepSpeed holds the weights of the rank of the pipeline that trains the most."""
    keys, dtype = recipe.zero, recipe.precision.settled
    blocks, weights = _largest(recipe, network, layout)
    trained = [weight.elements for weight in weights if weight.trained]
    frozen = [weight.elements for weight in weights if not weight.trained and weight.quantized is None]
    kept_whole = keys.stage3_param_persistence_threshold
    reduced = recipe.deepspeed.communication_data_type or dtype
    return ZeroJob(
        stage=keys.stage,
        ranks=layout.dp * layout.cp,
        stride=layout.tp,
        trained=sum(trained),
        frozen=sum(frozen),
        tensors=len(trained),
        modules=MODULES_OF_LAYER * sum(block.kind == "layer" for block in blocks),
        divided=sum(elements for elements in (*trained, *frozen) if elements > kept_whole),
        live=max(keys.stage3_max_live_parameters, keys.stage3_max_reuse_distance),
        itemsize=ITEMSIZE[dtype],
        reduced=ITEMSIZE[reduced],
        dtype=dtype,
        micro_batches=plan.num_micro_batches,
        overlaps=keys.overlap_comm,
        optimizer_on=keys.offload_optimizer.device,
        weights_on=keys.offload_param.device,
        states=len(states_of(recipe.optimizer)),
    )


def _largest(recipe: Recipe, network: TransformerConfig, layout: Layout) -> tuple[Sequence[Block], list[Weight]]:
    """Return the blocks of the rank of the pipeline that trains the most, and its weights."""
    counted = RankWeights(network=network, tensor=layout.tp, tuning=recipe.tuning)
    ranks = stages_of_ranks(recipe, network)
    held = [([block for blocks in stages.values() for block in blocks], counted.of_stages(stages)) for stages in ranks]
    return max(held, key=lambda one: sum(weight.elements for weight in one[1] if weight.trained))
