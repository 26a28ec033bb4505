"""The dict given to `deepspeed.initialize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import RecipeError
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import OffloadParam, Recipe


def deepspeed_config(
    recipe: Recipe,
    plan: BatchPlan,
    *,
    largest_weight: int | None = None,
) -> dict[str, Any]:
    """Return the dict that DeepSpeed gets, and nothing beside it.

    It has no optimizer, schedule, loss scale or checkpoint section: those are ours.
    `largest_weight` [elements] sizes the swap buffers of weights on NVMe where the recipe does not.
    RecipeError when the recipe's own buffers are too small.
    """
    policy = recipe.deepspeed
    config: dict[str, Any] = {
        "train_batch_size": plan.global_sequences,
        "train_micro_batch_size_per_gpu": plan.micro_sequences,
        "gradient_accumulation_steps": plan.num_micro_batches,
        # Stage 0 is clipped by the engine, with the same norm that it reports.
        "gradient_clipping": recipe.train.clip_norm if recipe.zero.stage else 0.0,
        **_precision(recipe),
        "zero_optimization": _zero(recipe, plan, largest_weight),
        # We build the optimizer: DeepSpeed accepts only those it has tested, and would insist on
        # its CPU Adam when offloading.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": policy.wall_clock_breakdown,
        "memory_breakdown": policy.memory_breakdown,
        "dump_state": policy.dump_state,
    }
    if policy.communication_data_type is not None:
        config["communication_data_type"] = policy.communication_data_type
    if policy.comms_logger.enabled:
        config["comms_logger"] = policy.comms_logger.model_dump()
    if _uses_nvme(config["zero_optimization"]):
        config["aio"] = policy.aio.model_dump()
    return config


def _precision(recipe: Recipe) -> dict[str, Any]:
    """Return the sections of the number format.

    At stage 0 DeepSpeed holds fp32 parameters in every dtype: our layers cast weights to the dtype,
    so master weights and accumulation are fp32 there too. At stages 1 to 3 the weights and the
    gradients of one micro-batch are in the dtype, and DeepSpeed keeps the fp32 master weights,
    whose first values `master_weights.py` sets.
    """
    if recipe.zero.stage == 0:
        return {}
    blocks: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
    if recipe.precision.settled == "bf16":
        # Without the check a single non-finite gradient ruins master weights and moments for good.
        blocks["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if recipe.precision.settled == "fp16":
        # The scale is a static 1: the engine hands over the scale of every step (see
        # `loss_scale.py`).
        blocks["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return blocks


def _zero(recipe: Recipe, plan: BatchPlan, largest_weight: int | None) -> dict[str, Any]:
    zero = recipe.zero.model_dump(exclude={"offload_optimizer", "offload_param"})
    if recipe.zero.offload_optimizer.device != "none":
        zero["offload_optimizer"] = _on_device(recipe.zero.offload_optimizer.model_dump())
    if recipe.zero.offload_param.device != "none":
        block = _on_device(recipe.zero.offload_param.model_dump())
        block["buffer_size"] = _buffer_size(recipe.zero.offload_param, plan, largest_weight)
        zero["offload_param"] = {key: value for key, value in block.items() if value is not None}
    return zero


def _on_device(block: dict[str, Any]) -> dict[str, Any]:
    if block["device"] != "nvme":
        del block["nvme_path"]
    return block


def _buffer_size(offload: OffloadParam, plan: BatchPlan, largest_weight: int | None) -> int | None:
    if largest_weight is None:
        return offload.buffer_size
    needed = -(-largest_weight // plan.dp)
    if offload.buffer_size is None:
        return needed
    if offload.device == "nvme" and offload.buffer_size < needed:
        raise RecipeError(
            f"zero.offload_param.buffer_size = {offload.buffer_size} elements cannot hold one rank's part of the largest "
            f"weight, {largest_weight} / {plan.dp} = {needed}; legal: {needed} or more, or leave it out"
        )
    return offload.buffer_size


def _uses_nvme(zero: Mapping[str, Any]) -> bool:
    return any(zero.get(name, {}).get("device") == "nvme" for name in ("offload_optimizer", "offload_param"))
