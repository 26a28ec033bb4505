"""Keys that DeepSpeed knows and a recipe may not hold, by the section where one would write them.

Each has its reason: the section that owns it, or why it is not supported. DeepSpeed 0.19 ignores
most keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "batch sizes have one owner: write batch.global_sequences and batch.micro_sequences"
_PRECISION = "number formats have one owner: write precision.dtype"
_TRACKING = "metrics have one owner: write"
_CHECKPOINT = "checkpoints are written by Triaxis itself, not by DeepSpeed"
_GONE = "DeepSpeed removed it"
_OURS = "Triaxis sets it itself"
_UNSUPPORTED = "not supported by this version"
_NORMALISATION = "gradients are normalised once, by the number of targets in a step"
_NO_DATA_ENGINE = "Triaxis loads the data itself; see the section data"

REFUSED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "deepspeed": {
            "train_batch_size": _BATCH,
            "train_micro_batch_size_per_gpu": _BATCH,
            "gradient_accumulation_steps": f"{_BATCH}; accumulation follows from them and the world size",
            "managed_gradient_accumulation": _OURS,
            "fp16": _PRECISION + ' "fp16"; its scale has keys of its own in precision',
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
            "sequence_parallel_size": f"{_UNSUPPORTED}: sequences are not divided over ranks yet",
            "use_data_before_expert_parallelism": _UNSUPPORTED,
            "seq_parallel_communication_data_type": _UNSUPPORTED,
            "checkpoint": _CHECKPOINT,
            "datastates": _CHECKPOINT,
            "datastates_ckpt": _CHECKPOINT,
            "load_universal": _CHECKPOINT,
            "prescale_gradients": _NORMALISATION,
            "gradient_predivide_factor": _NORMALISATION,
            "gradient_allreduce_op": _NORMALISATION,
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
    """Return why a key of DeepSpeed may not stand in this section of a recipe.

    None if DeepSpeed does not know the key either.
    """
    here = REFUSED.get(section, {})
    return here.get(key) or REFUSED["deepspeed"].get(key) or REFUSED["zero"].get(key)
