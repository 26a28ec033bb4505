"""The job of a recipe: what its ranks compute in a step, as the planner times it. No torch."""

from __future__ import annotations

from parallel.topology import Layout
from trainer.model.config import TransformerConfig
from trainer.planner.operations import Kernels
from trainer.planner.states import ITEMSIZE
from trainer.planner.step_time import Job
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.stages import stages_of
from trainer.schema import Recipe

# Our layers: attention by a fused kernel, norms and activations as torch has them.
OURS = Kernels(scores_written=False, dropout=False, hidden_passes=12, ffn_passes=4, head_passes=8, calls=(40, 60))


def job_of(recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout) -> Job:
    """Return the job of a recipe whose compute format is known."""
    parallel, dtype = recipe.parallel, recipe.precision.settled
    return Job(
        network=network,
        layout=layout,
        kernels=OURS,
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
    )


def _layers_of_stages(recipe: Recipe, network: TransformerConfig) -> tuple[int, ...]:
    if recipe.parallel.pipeline == 1:
        return ()
    return tuple(sum(block.kind == "layer" for block in blocks) for blocks in stages_of(recipe, network))
