"""The dict given to `deepspeed.initialize`, and what a recipe may say of it.

DeepSpeed 0.19 ignores most keys that it does not know, so `zero` and `deepspeed` take only keys listed in `sections.py`,
and each other key of DeepSpeed is refused here with its reason: which section owns it, or why it is not supported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from trainer.batching import BatchPlan
from trainer.errors import RecipeError
from trainer.sections import Finding, OffloadParam, Recipe


def deepspeed_config(
    recipe: Recipe,
    plan: BatchPlan,
    *,
    largest_weight: int | None = None,
) -> dict[str, Any]:
    """Exactly what DeepSpeed gets. Optimizer, schedule, loss scale and checkpoints are not in it: they are ours.

    `largest_weight` [elements] sizes the swap buffers of weights on NVMe where the recipe does not; RecipeError when the
    recipe's own are too small.
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
        # Our optimizer is built by us: DeepSpeed only tests its own, and would insist on its CPU Adam when offloading.
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
    """At stage 0 DeepSpeed holds fp32 parameters, whatever the dtype: our layers cast weights to it, so master weights
    and accumulation are fp32 there too. At stages 1 to 3 weights and one micro-batch's gradients are in the dtype, and
    DeepSpeed keeps the fp32 master weights, whose first values `master_weights.py` sets."""
    if recipe.zero.stage == 0:
        return {}
    blocks: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
    if recipe.precision.dtype == "bf16":
        # Without the check a single non-finite gradient ruins master weights and moments for good.
        blocks["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if recipe.precision.dtype == "fp16":
        # A static 1: the engine hands over the scale of every step (see `loss_scale.py` for why).
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


STATES = 4  # of Adam: the weights, two moments, the gradient


def zero_findings(recipe: Recipe) -> Iterator[Finding]:
    """Combinations of ZeRO, offload and optimizer that cannot work, with the legal neighbours."""
    yield from _stage_findings(recipe)
    yield from _offload_findings(recipe)
    yield from _optimizer_findings(recipe)


def _stage_findings(recipe: Recipe) -> Iterator[Finding]:
    zero = recipe.zero
    weights, states = zero.offload_param.device, zero.offload_optimizer.device
    if weights != "none" and zero.stage != 3:
        yield Finding(
            ("zero.offload_param.device", "zero.stage"),
            f"zero.offload_param.device = {json.dumps(weights)} needs zero.stage 3, which divides the weights, not "
            f'{zero.stage}; legal: zero.stage 3, or zero.offload_param.device "none"',
        )
    if states == "nvme" and zero.stage != 3:
        legal = '"cpu" or "none"' if zero.stage else '"none"'
        yield Finding(
            ("zero.offload_optimizer.device", "zero.stage"),
            f'zero.offload_optimizer.device = "nvme" needs zero.stage 3, not {zero.stage}; legal: zero.stage 3, or '
            f"zero.offload_optimizer.device {legal}",
        )
    if states == "cpu" and zero.stage == 0:
        yield Finding(
            ("zero.offload_optimizer.device", "zero.stage"),
            'zero.offload_optimizer.device = "cpu" needs a zero.stage that divides the optimizer state, not 0; '
            'legal: zero.stage 1, 2 or 3, or zero.offload_optimizer.device "none"',
        )


def _offload_findings(recipe: Recipe) -> Iterator[Finding]:
    for name in ("offload_optimizer", "offload_param"):
        block, path = getattr(recipe.zero, name), f"zero.{name}"
        keys = (f"{path}.nvme_path", f"{path}.device")
        if block.device == "nvme" and block.nvme_path is None:
            yield Finding(keys[::-1], f'{path}.device = "nvme" needs {path}.nvme_path, a folder on a local NVMe drive')
        if block.device != "nvme" and block.nvme_path is not None:
            yield Finding(
                keys,
                f'{path}.nvme_path = {json.dumps(block.nvme_path)} is used only with {path}.device "nvme", not '
                f'{json.dumps(block.device)}; legal: device "nvme", or no nvme_path',
            )
    offload = recipe.zero.offload_optimizer
    if offload.device == "nvme" and (offload.pipeline_read or offload.pipeline_write) and offload.buffer_count < 2 * STATES:
        yield Finding(
            (
                "zero.offload_optimizer.buffer_count",
                "zero.offload_optimizer.pipeline_read",
                "zero.offload_optimizer.pipeline_write",
            ),
            f"zero.offload_optimizer.buffer_count = {offload.buffer_count}: with pipeline_read or pipeline_write two tiles of "
            f"{STATES} buffers each are in memory at once; legal: {2 * STATES} or more, or both false",
        )
    for key in ("pipeline_read", "pipeline_write"):
        if getattr(offload, key) and offload.device != "nvme":
            yield Finding(
                (f"zero.offload_optimizer.{key}", "zero.offload_optimizer.device"),
                f'zero.offload_optimizer.{key} is used only with device "nvme", not {json.dumps(offload.device)}; legal: false',
            )


def _optimizer_findings(recipe: Recipe) -> Iterator[Finding]:
    name, stage = recipe.optimizer.name, recipe.zero.stage
    if name == "adafactor" and stage:
        yield Finding(
            ("optimizer.name", "zero.stage"),
            f"optimizer.name = adafactor keeps second moments per row and column, which zero.stage {stage} flattens away; "
            "legal: zero.stage 0, or optimizer.name adamw, adam, sgd or lion",
        )
    if name == "adafactor" and recipe.parallel.tensor > 1:
        yield Finding(
            ("optimizer.name", "parallel.tensor"),
            "optimizer.name = adafactor averages second moments over whole rows and columns of a weight, of which "
            f"parallel.tensor {recipe.parallel.tensor} gives each rank a part: not the same training; legal: "
            "parallel.tensor 1, or optimizer.name adamw, adam, sgd or lion",
        )
    if name in ("lion", "sgd", "adafactor") and recipe.zero.offload_optimizer.device == "nvme":
        yield Finding(
            ("optimizer.name", "zero.offload_optimizer.device"),
            f'optimizer.name = {name} cannot be offloaded to "nvme": DeepSpeed swaps exactly the states of Adam; '
            'legal: adamw or adam, or zero.offload_optimizer.device "cpu" or "none"',
        )


# Keys that DeepSpeed knows and a recipe may not hold, by the section where somebody would write them.

_BATCH = "batch sizes have one owner: write batch.global_sequences and batch.micro_sequences"
_PRECISION = "number formats have one owner: write precision.dtype"
_TRACKING = "metrics have one owner: write"
_CHECKPOINT = "checkpoints are written by Triaxis itself, not by DeepSpeed"
_GONE = "DeepSpeed removed it"
_OURS = "Triaxis sets it itself"
_UNSUPPORTED = "not supported by this version"
_NO_DATA_ENGINE = "Triaxis loads the data itself; see the section data"

REFUSED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "deepspeed": {
            "train_batch_size": _BATCH,
            "train_micro_batch_size_per_gpu": _BATCH,
            "gradient_accumulation_steps": f"{_BATCH}; accumulation follows from them and the world size",
            "managed_gradient_accumulation": _OURS,
            "fp16": _PRECISION + ' "fp16" and precision.loss_scale',
            "bf16": _PRECISION + ' "bf16"',
            "bfloat16": _PRECISION + ' "bf16"',
            "torch_autocast": _PRECISION,
            "data_types": f"{_PRECISION}; gradients always accumulate in fp32",
            "gradient_clipping": "clipping has one owner: write train.clip_norm",
            "optimizer": "write the section optimizer",
            "scheduler": "write the section schedule",
            "zero_optimization": "write the section zero",
            "zero_allow_untested_optimizer": _OURS,
            "zero_force_ds_cpu_optimizer": _OURS,
            "activation_checkpointing": "write train.recompute",
            "tensorboard": f"{_TRACKING} tracking.tensorboard",
            "wandb": f"{_TRACKING} tracking.wandb",
            "csv_monitor": "metrics.jsonl is always written to the run folder",
            "comet": f"{_UNSUPPORTED}; {_TRACKING} the section tracking",
            "steps_per_print": "write train.log_every",
            "log_level": _OURS,
            "pipeline": "write parallel.pipeline",
            "tensor_parallel": "write parallel.tensor",
            "expert_parallel": _UNSUPPORTED,
            "sequence_parallel_size": "write parallel.context",
            "use_data_before_expert_parallelism": _UNSUPPORTED,
            "seq_parallel_communication_data_type": _UNSUPPORTED,
            "checkpoint": _CHECKPOINT,
            "datastates": _CHECKPOINT,
            "datastates_ckpt": _CHECKPOINT,
            "load_universal": _CHECKPOINT,
            "prescale_gradients": "the normalisation of gradients has one owner, batching.loss_factor",
            "gradient_predivide_factor": "the normalisation of gradients has one owner, batching.loss_factor",
            "gradient_allreduce_op": "the normalisation of gradients has one owner, batching.loss_factor",
            "disable_allgather": _UNSUPPORTED,
            "disable_python_gc": _UNSUPPORTED,
            "dataloader_drop_last": _NO_DATA_ENGINE,
            "data_efficiency": _NO_DATA_ENGINE,
            "vocabulary_size": "write model.config.vocab_size",
            "flops_profiler": f"{_UNSUPPORTED}; every step's MFU is in metrics.jsonl",
            "autotuning": _UNSUPPORTED,
            "hybrid_engine": _UNSUPPORTED,
            "weight_quantization": _UNSUPPORTED,
            "compile": _UNSUPPORTED,
            "timers": "write deepspeed.wall_clock_breakdown",
            "allgather_size": "deprecated; write zero.allgather_bucket_size",
            "amp": f"{_GONE}; write precision.dtype",
            "compression_training": _GONE,
            "curriculum_learning": _GONE,
            "eigenvalue": _GONE,
            "elasticity": _GONE,
            "graph_harvesting": _GONE,
            "nebula": _GONE,
            "progressive_layer_drop": _GONE,
            "quantize_training": _GONE,
            "sparse_attention": _GONE,
            "sparse_gradients": _GONE,
        },
        "deepspeed.aio": {"use_gds": _UNSUPPORTED},
        "zero": {
            "allgather_partitions": "Triaxis leaves it on: broadcasts are slower at every size",
            "use_multi_rank_bucket_allreduce": _UNSUPPORTED,
            "compute_grad_norm": "the gradient norm is always recorded",
            "load_from_fp32_weights": _CHECKPOINT,
            "elastic_checkpoint": _CHECKPOINT,
            "pipeline_loading_checkpoint": _CHECKPOINT,
            "gather_16bit_weights_on_model_save": _CHECKPOINT,
            "stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
            "stage3_gather_fp16_weights_on_model_save": f"deprecated; {_CHECKPOINT}",
            "cpu_offload": 'deprecated; write zero.offload_optimizer {"device": "cpu"}',
            "cpu_offload_param": 'deprecated; write zero.offload_param {"device": "cpu"}',
            "cpu_offload_use_pin_memory": "deprecated; write pin_memory in zero.offload_optimizer or zero.offload_param",
            "prefetch_bucket_size": "write zero.stage3_prefetch_bucket_size",
            "param_persistence_threshold": "write zero.stage3_param_persistence_threshold",
            "max_live_parameters": "write zero.stage3_max_live_parameters",
            "max_reuse_distance": "write zero.stage3_max_reuse_distance",
            "model_persistence_threshold": _UNSUPPORTED,
            "stage3_model_persistence_threshold": _UNSUPPORTED,
            "module_granularity_threshold": _UNSUPPORTED,
            "stage3_module_granularity_threshold": _UNSUPPORTED,
            "use_all_reduce_for_fetch_params": _UNSUPPORTED,
            "stage3_use_all_reduce_for_fetch_params": _UNSUPPORTED,
            "allgather_sequential": _UNSUPPORTED,
            "stage3_allgather_sequential": _UNSUPPORTED,
            "ignore_unused_parameters": "every parameter of these models is used",
            "legacy_stage1": "deprecated; zero.stage 1 is the current implementation",
            "parameter_alignment": _UNSUPPORTED,
            "zenflow": _UNSUPPORTED,
            "zero_hpz_partition_size": _UNSUPPORTED,
            "zero_quantized_weights": _UNSUPPORTED,
            "zero_quantized_nontrainable_weights": _UNSUPPORTED,
            "zero_quantized_gradients": _UNSUPPORTED,
            "memory_efficient_linear": "Triaxis has its own linear layers",
            "override_module_apply": _OURS,
            "log_trace_cache_warnings": _UNSUPPORTED,
            "enable_sanity_checks": _UNSUPPORTED,
            "save_muon_momentum_buffer_in_memory": "there is no Muon in this version",
            "leaf_module": _UNSUPPORTED,
            "mics_shard_size": _GONE,
            "mics_hierarchical_params_gather": _GONE,
            "zeropp_loco_param": _GONE,
        },
        "zero.offload_optimizer": {
            "fast_init": _UNSUPPORTED,
            "super_offload": _UNSUPPORTED,
            "cpuadam_cores_perc": _UNSUPPORTED,
            "ratio": "it needs DeepSpeed's own CPU Adam, which is not used here: all of the optimizer's state is offloaded",
            "buffer_size": "the optimizer's buffers are sized by DeepSpeed; zero.offload_param has buffer_size",
            "max_in_cpu": "only zero.offload_param has it",
        },
        "zero.offload_param": {
            "ratio": _UNSUPPORTED,
            "pipeline_read": "only zero.offload_optimizer has it",
            "pipeline_write": "only zero.offload_optimizer has it",
        },
    }
)


def refusal(section: str, key: str) -> str | None:
    """Why a key of DeepSpeed may not stand in this section of a recipe; None when DeepSpeed does not know it either."""
    here = REFUSED.get(section, {})
    return here.get(key) or REFUSED["deepspeed"].get(key) or REFUSED["zero"].get(key)
