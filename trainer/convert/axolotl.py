"""axolotl's config."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.convert import rules
from trainer.convert.axolotl_data import sources
from trainer.convert.beside import deepspeed, fsdp
from trainer.convert.draft import Draft, Tool
from trainer.convert.rows import Row, Set, if_true, joint, key, listed, none, number, several, text, whole, words, yes
from trainer.convert.trainer_arguments import HUB, OPTIMIZERS, RESUME, SCHEDULES
from trainer.convert.trainer_arguments import ROWS as TRAINER
from trainer.convert.tuning_words import EVERYTHING, METHODS, targets, use_dora

CYCLE = "a rate that rises and falls in cycles is not there: the recipe has one cosine"
SCHEDULERS = {
    **SCHEDULES,
    "one_cycle": Set({"schedule.name": "cosine", "schedule.min_lr_ratio": 0.0}, CYCLE),
    "rex": Set({"schedule.name": "linear", "schedule.min_lr_ratio": 0.0}, "it is not there: the recipe has linear"),
    "log_sweep": Set({"schedule.name": "constant"}, "it is not there: the recipe keeps the rate constant"),
}
LOSSES = {
    "dpo": Set({"data.task": "preference", "preference.loss": "dpo"}),
    "ipo": Set({"data.task": "preference", "preference.loss": "ipo"}),
    "orpo": Set({"data.task": "preference", "preference.loss": "orpo"}),
    "simpo": Set({"data.task": "preference", "preference.loss": "dpo"}, "it is not there: the recipe has dpo, the nearest"),
    **{
        name: Set({"data.task": "sft"}, "reinforcement learning is not there: the recipe learns the answers of the rows")
        for name in ("kto", "grpo", "gdpo", "ebft")
    },
}
TEMPLATES = {
    **{"tokenizer_default": "", "jinja": "", "qwen_25": "qwen2.5", "phi_3": "phi3", "gemma": "gemma2", "mistral_v1": "mistral"},
    **{name: name for name in ("alpaca", "chatml", "llama3", "gemma3")},
}

KERNELS = "the layers and their kernels are our own"
NO_MEDIA = "texts are all that is learned here"
PACKED = "rows are always packed by best fit, and do not see each other"
ONE_RULE = "the keys of section optimizer are all that an update rule reads"
SCHEDULE = "the keys of section schedule are all that the rate depends on"
NOT_TRACKED = "there is no mirror of metrics.jsonl there: wandb and tensorboard are"
LORA_ONLY = "low-rank factors have tuning.rank, alpha, dropout and targets, the same in all layers"
SAMPLES = "train.sample_prompt prints one continuation after the last step"
DETECTED = "axolotl finds it out itself"
MERGE_FIRST = "merge it into its model first, and name the folder of the whole model in base_model"
TOKENIZER = "a tokenizer is used as its folder has it"
OTHER_LOSSES = "the loss is the mean over all targets of a step"
DISTILLATION = "there is no distillation"
BOUNDARIES = "a row that is longer than data.seq_len is cut there"


def _bf16(value: object) -> Set:
    """Return bf16 for true, "full" and "auto", of which the last means: where the GPU has it."""
    return Set({"precision.dtype": "bf16"} if value in (True, "full", "auto") else {})


def _filler(_: object) -> Set:
    """Return nothing for the token that fills sequences, which is neither read nor learned."""
    return Set()


def _recompute(value: object) -> Set:
    if value in ("offload", "offload_disk"):
        return Set({"train.recompute": "full"}, "what is kept stays on the device")
    return Set({"train.recompute": "full"} if value is True else {})


def _target_linear(value: object) -> Set:
    return Set({"tuning.targets": list(EVERYTHING)} if yes(value) else {})


ROWS: Mapping[str, Row] = {
    # model
    "base_model": key("model.from_pretrained", text),
    "tokenizer_config": key("data.tokenizer", text),
    "revision_of_model": key("model.revision", text),
    **several(
        'from_pretrained\'s config.json says it; model.family "auto" takes any model',
        *("base_model_config", "cls_model_config", "model_type", "type_of_model", "processor_type", "processor_kwargs"),
    ),
    **{
        name: none("it is found in the config of the model", default=default)
        for name, default in (("model_type", "AutoModelForCausalLM"), ("type_of_model", "AutoModelForCausalLM"))
    },
    "tokenizer_type": none(TOKENIZER, default="AutoTokenizer"),
    **several(TOKENIZER, "tokenizer_legacy", "tokenizer_use_mistral_common", "added_tokens_overrides", "fix_untrained_tokens"),
    "tokenizer_use_fast": none(TOKENIZER, default=True),
    "tokenizer_save_jinja_files": none(TOKENIZER, default=True),
    "trust_remote_code": none(
        'a model\'s code runs only with model.family "auto" and a model.revision; our families have none'
    ),
    "overrides_of_model_config": none("the weights of from_pretrained fix it, but for rates of dropout in model.config"),
    "overrides_of_model_kwargs": none("the keys of section model are all that loading reads"),
    "reinit_weights": none("write model.family and model.config in place of model.from_pretrained", near="model.family"),
    "low_cpu_mem_usage": none("weights are read tensor by tensor", default=True),
    "experimental_skip_move_to_device": none("weights are read tensor by tensor", default=True),
    **several("rows of new tokens are added as data.new_tokens needs them", "resize_token_embeddings_to_32x"),
    **several("rows of new tokens are added as data.new_tokens needs them", "mean_resizing_embeddings", "shrink_embeddings"),
    "embeddings_skip_upcast": none("master weights are fp32"),
    "rope_scaling": none("positions are those of model.from_pretrained; a new model has model.config.rope_scaling"),
    "special_tokens.pad_token": key("", _filler),
    "special_tokens.bos_token": none(TOKENIZER),
    "special_tokens.eos_token": none(TOKENIZER),
    "special_tokens.unk_token": none(TOKENIZER),
    "special_tokens.additional_special_tokens": key("data.new_tokens", listed),
    "tokens": key("data.new_tokens", listed),
    "eot_tokens": none("an answer ends with the token that the template writes there"),
    **several("base weights are quantized here, as they are loaded", "gptq", "model_quantization_config", "use_onebitllms"),
    **several("base weights are quantized here, as they are loaded", "model_quantization_config_kwargs", "bnb_config_kwargs"),
    **several(KERNELS, "use_kernels", "xformers_attention", "sdp_attention", "flex_attention", "flex_attn_compile_kwargs"),
    **several(KERNELS, "flash_attention", "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "flash_attn_rms_norm"),
    **several(KERNELS, "flash_optimum", "sage_attention", "eager_attention", "attn_implementation", "s2_attention"),
    **several(KERNELS, "gemma4_hybrid_attn_impl", "large_head_attention", "flash_attn_d512", "sdpa_varlen"),
    **several(KERNELS, "fused_attn_kernel", "experts_implementation", "scaling_softmax", "scaling_softmax_factor"),
    **several(KERNELS, "scaling_softmax_bias", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"),
    **several(KERNELS, "chunked_cross_entropy", "chunked_cross_entropy_num_chunks", "cut_cross_entropy", "tiled_mlp"),
    **several(KERNELS, "tiled_mlp_num_shards", "llama4_linearized_experts", "quantize_moe_experts", "dense_mixer"),
    "tiled_mlp_use_original_mlp": none(KERNELS, default=True),
    **several(
        KERNELS,
        *("liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_swiglu", "liger_glu_activation"),
        *("liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_use_token_scaling"),
    ),
    **several(KERNELS, "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_compile_options", "deepcompile"),
    "plugins": none("there are no plugins: what has a key of a recipe is there"),
    # tuning
    "adapter": key("tuning.method", words(METHODS, "tuning.method has lora, dora, adalora, ia3, adapter and bitfit")),
    "load_in_4bit": key("tuning.quantize", if_true({"tuning.quantize": "nf4"})),
    "load_in_8bit": key("tuning.quantize", if_true({"tuning.quantize": "int8"})),
    "lora_r": key("tuning.rank", whole),
    "lora_alpha": key("tuning.alpha", number),
    "lora_dropout": key("tuning.dropout", number, default=0.0),
    "lora_target_modules": key("tuning.targets", targets),
    "lora_target_linear": key("tuning.targets", _target_linear),
    "peft_use_rslora": key("tuning.rank_stabilized", yes),
    "peft_use_dora": joint("tuning.method"),
    "merge_lora": key("tuning.merge", yes),
    "merge_method": none("tuning.merge has one method", default="memory_efficient"),
    "lora_model_dir": none(MERGE_FIRST),
    "lora_modules_to_save": none("only the rows of data.new_tokens are trained beside an adapter", near="data.new_tokens"),
    "peft_trainable_token_indices": none("the rows of data.new_tokens are trained", near="data.new_tokens"),
    **several(LORA_ONLY, "lora_target_parameters", "lora_fan_in_fan_out", "lora_rank_pattern", "lora_alpha_pattern"),
    **several(LORA_ONLY, "peft_layers_to_transform", "peft_layers_pattern", "peft", "peft_layer_replication"),
    **several(LORA_ONLY, "peft_init_lora_weights", "peft_ensure_weight_tying", "lora_on_cpu", "qlora_sharded_model_loading"),
    "peft_autocast_adapter_dtype": none("factors are fp32", default=True),
    "loraplus_lr_ratio": none("both factors have one learning rate"),
    "loraplus_lr_embedding": none("both factors have one learning rate", default=1e-6),
    **several(LORA_ONLY, "relora", "relora_prune_ratio", "relora_cpu_offload", "lisa_n_layers", "lisa_step_interval"),
    **several(LORA_ONLY, "jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps", "mora"),
    "relora_prune_method": none(LORA_ONLY, default="magnitude"),
    "lisa_layers_attribute": none(LORA_ONLY, default="model.layers"),
    "unfrozen_parameters": none("single parameters cannot be frozen: tuning.method trains fewer", near="tuning.method"),
    "spectrum_top_fraction": none("single parameters cannot be frozen: tuning.method trains fewer", default=0.5),
    "spectrum_model_name": none("single parameters cannot be frozen: tuning.method trains fewer"),
    # data
    "datasets": joint("data.sources"),
    "test_datasets": joint("data.eval_sources"),
    "pretraining_dataset": joint("data.sources"),
    "val_set_size": joint("data.eval_fraction", default=0.0),
    "sequence_len": key("data.seq_len", whole, default=512),
    "eval_sequence_len": none("evaluation has data.seq_len tokens a sequence", near="data.seq_len"),
    "max_prompt_len": none("a prompt and its answer together have data.seq_len tokens", near="data.seq_len"),
    "max_packed_sequence_len": none("write sequence_len", near="data.seq_len"),
    "excess_length_strategy": none(BOUNDARIES, default="truncate"),
    "min_sample_len": none("rows of every length are read"),
    "sample_packing": none(PACKED, default=True),
    "eval_sample_packing": none(PACKED, default=True),
    "sample_packing_group_size": none(PACKED, default=100000),
    "sample_packing_bin_size": none(PACKED, default=200),
    **several(PACKED, "sample_packing_sequentially", "sample_packing_mp_start_method", "sample_packing_eff_est"),
    **several(PACKED, "pad_to_multiple_of", "multipack_real_batches", "batch_flattening", "pretrain_multipack_buffer_size"),
    "pad_to_sequence_len": none(PACKED, default=True),
    "pretrain_multipack_attn": key("data.isolate_documents", yes),
    "pretraining_sample_concatenation": none(PACKED, default=True),
    "group_by_length": none(PACKED),
    "curriculum_sampling": none("sequences are drawn at random, by run.seed", near="run.seed"),
    "shuffle_merged_datasets": none("sequences are drawn at random, by run.seed", default=True),
    "shuffle_before_merging_datasets": none("sequences are drawn at random, by run.seed"),
    **several("positions restart in each document, and are not stretched", "use_pose", "pose_split_on_token_ids"),
    **several("positions restart in each document, and are not stretched", "pose_max_context_len", "pose_num_chunks"),
    "train_on_inputs": key("data.learn", if_true({"data.learn": "all"})),
    "chat_template": joint("data.chat_template"),
    "chat_template_jinja": none("conversations are written by the tokenizer's own chat template"),
    "chat_template_kwargs": none("a row's own chat_template_kwargs are given to its template"),
    "default_system_message": none("a row's field system has it"),
    "dataset_prepared_path": key("data.cache_dir", text),
    "dataset_processes": key("data.workers", whole),
    "dataset_num_proc": key("data.workers", whole),
    "dataset_exact_deduplication": none("rows are read as they are: remove repeated ones in the file"),
    **several("rows are tokenized ahead of training, to the disk", "dataset_shard_num", "dataset_shard_idx", "streaming"),
    **several("rows are tokenized ahead of training, to the disk", "skip_prepare_dataset", "num_dataset_shards_to_save"),
    **several("rows are tokenized ahead of training, to the disk", "dataset_keep_in_memory", "is_preprocess"),
    **several("rows are tokenized ahead of training, to the disk", "preprocess_iterable"),
    "streaming_multipack_buffer_size": none("rows are tokenized ahead of training, to the disk", default=10000),
    "push_dataset_to_hub": none(HUB),
    "hf_use_auth_token": none("HF_TOKEN in the environment is read"),
    **{name: TRAINER[name] for name in TRAINER if name.startswith("dataloader_")},
    **{name: TRAINER[name] for name in ("remove_unused_columns", "neftune_noise_alpha")},
    "accelerator_config": none("collectives are set up here, for every layout"),
    "noisy_embedding_alpha": TRAINER["neftune_noise_alpha"],
    **several(NO_MEDIA, "image_size", "image_resize_algorithm", "role_boundaries", "freeze_mm_modules"),
    # preferences and rewards
    "rl": key("preference.loss", words(LOSSES)),
    "rl_beta": key("preference.beta", number),
    "dpo_beta": key("preference.beta", number),
    "orpo_alpha": key("preference.beta", number),
    "dpo_label_smoothing": key("preference.label_smoothing", number),
    **several("preference.loss has dpo, ipo and orpo", "simpo_gamma", "cpo_alpha", "rpo_alpha", "dpo_norm_loss"),
    **several("preference.loss has dpo, ipo and orpo", "kto_desirable_weight", "kto_undesirable_weight", "dpo_use_weighting"),
    **several("preference.loss has dpo, ipo and orpo", "dpo_loss_type", "dpo_loss_weights"),
    **several("the reference's log-probabilities are always computed once, ahead", "precompute_ref_log_probs"),
    **several("answers are packed, and heads need no full logits", "dpo_use_liger_kernel", "dpo_padding_free"),
    **several("answers are packed, and heads need no full logits", "dpo_use_logits_to_keep", "dpo_generate_during_eval"),
    **several("reward models and reinforcement learning are not there", "trl", "vllm", "ebft", "reward_model"),
    **several("reward models and reinforcement learning are not there", "process_reward_model", "center_rewards_coefficient"),
    "num_labels": none("data.classes names the classes of data.task classify", near="data.classes"),
    # how long, and by how much at once
    "micro_batch_size": joint("batch.micro_sequences", default=1),
    "gradient_accumulation_steps": joint("batch.global_sequences", default=1),
    "batch_size": none(
        "write micro_batch_size × gradient_accumulation_steps; batch.global_sequences has it", near="batch.global_sequences"
    ),
    "eval_batch_size": TRAINER["per_device_eval_batch_size"],
    "auto_find_batch_size": TRAINER["auto_find_batch_size"],
    "num_epochs": joint("train.epochs", default=1.0),
    "max_steps": joint("train.steps"),
    # the update
    "learning_rate": key("optimizer.lr", number),
    "optimizer": key("optimizer.name", words(OPTIMIZERS), default="adamw_torch_fused"),
    "weight_decay": key("optimizer.weight_decay", number, default=0.0),
    "adam_beta1": joint("optimizer.betas", default=0.9),
    "adam_beta2": joint("optimizer.betas", default=0.999),
    "adam_epsilon": key("optimizer.eps", number, default=1e-8),
    "max_grad_norm": key("train.clip_norm", number, default=1.0),
    "lr_scheduler": key("schedule.name", words(SCHEDULERS), default="cosine"),
    "cosine_min_lr_ratio": key("schedule.min_lr_ratio", number),
    "lr_scheduler_kwargs": none(SCHEDULE),
    "warmup_steps": joint("schedule.warmup_steps", default=0),
    "warmup_ratio": joint("schedule.warmup_steps", default=0.0),
    **several(SCHEDULE, "lr_quadratic_warmup", "cosine_constant_lr_ratio", "lr_div_factor"),
    **several("all weights have one learning rate", "embedding_lr", "embedding_lr_scale", "lr_groups"),
    **several(ONE_RULE, "optim_args", "optim_target_modules", "torchdistx_path", "adam_epsilon2", "adam_beta3", "dion_lr"),
    **several(ONE_RULE, "dion_momentum", "grokfast_alpha", "grokfast_lamb"),
    **{
        name: none(ONE_RULE, default=default)
        for name, default in {
            **{"dion_rank_fraction": 1.0, "dion_rank_multiple_of": 1, "qgalore_rank": 256, "qgalore_update_proj_gap": 200},
            **{"qgalore_scale": 0.25, "qgalore_proj_type": "std", "qgalore_proj_quant": True, "qgalore_proj_bits": 4},
            **{"qgalore_proj_group_size": 256, "qgalore_cos_threshold": 0.4, "qgalore_gamma_proj": 2, "qgalore_queue_size": 5},
        }.items()
    },
    **several(OTHER_LOSSES, "use_eaft", "diffusion"),
    "eaft_alpha": none(OTHER_LOSSES, default=1.0),
    "eaft_k": none(OTHER_LOSSES, default=20),
    **several(DISTILLATION, "kd_trainer", "kd_ce_alpha", "kd_alpha", "kd_temperature", "kd_normalize_topk", "kd_beta"),
    **several(DISTILLATION, "kd_online_server_base_url", "kd_online_topk", "kd_online_server", "kd_temperature_min"),
    "kd_online_timeout": none(DISTILLATION, default=120),
    # formats and memory
    "bf16": key("precision.dtype", _bf16, default="auto"),
    "bfloat16": key("precision.dtype", _bf16),
    "fp16": key("precision.dtype", if_true({"precision.dtype": "fp16"})),
    "float16": key("precision.dtype", if_true({"precision.dtype": "fp16"})),
    "float32": key("precision.dtype", if_true({"precision.dtype": "fp32"})),
    **several("fp8 is not there", "fp8", "fp8_enable_fsdp_float8_all_gather"),
    "tf32": joint("precision.matmul", default="auto"),
    "gradient_checkpointing": key("train.recompute", _recompute, default=False),
    "gradient_checkpointing_kwargs": none("train.recompute has no further keys"),
    "selective_checkpointing": none('train.recompute "selective" recomputes the attention core', near="train.recompute"),
    **several("activations are recomputed (train.recompute) or kept, not moved", "activation_offloading"),
    "layer_offloading": none('zero.offload_param {"device": "cpu"} moves weights', near="zero.offload_param"),
    **several("sections parallel and zero place weights", "device", "device_map", "max_memory", "gpu_memory_limit"),
    **several("torch's allocator is left alone", "gc_steps", "torch_empty_cache_steps", "gc_collect_steps"),
    **several("norms are computed in fp32", "fp32_norms", "fp32_norm_classes"),
    **several("a trained model is not quantized here", "qat", "quantization", "llmcompressor"),
    # devices
    "deepspeed": joint("zero"),
    "fsdp": joint("zero.stage"),
    "fsdp_config": joint("zero.stage"),
    "fsdp_version": none("zero.stage 3 divides weights as FSDP does", near="zero.stage"),
    "fsdp_final_state_dict_type": none("`triaxis export` writes the whole model", default="FULL_STATE_DICT"),
    "tensor_parallel_size": key("parallel.tensor", whole),
    "context_parallel_size": none("sequences are not divided over ranks yet", default=1),
    "sequence_parallel_degree": none("sequences are not divided over ranks yet", default=1),
    "heads_k_stride": none("sequences are not divided over ranks yet", default=1),
    "ring_attn_func": none("sequences are not divided over ranks yet"),
    "dp_shard_size": none("the data-parallel degree follows from the number of ranks"),
    "dp_replicate_size": none("the data-parallel degree follows from the number of ranks", default=1),
    **several("mixtures of experts are not trained here", "expert_parallel_size", "expert_parallel_backend"),
    **several(
        "mixtures of experts are not trained here",
        *("expert_parallel_num_nvl_bytes", "expert_parallel_num_rdma_bytes", "expert_parallel_token_capacity"),
        *("expert_parallel_fallback_on_unsupported", "expert_backend", "nonexpert_quantization", "moe_grouped_backend"),
        *("moe_dequant_chunk_size", "moe_bnb_fast", "use_scattermoe", "use_sonicmoe", "use_glm_dsa_kernels"),
        *("use_dsv4_kernels", "dsv4_bf16_all", "dsv4_fp4_grouped_mode", "dsv4_fp8_lora_kernel"),
        *("dsv4_fp8_nonexpert_mode", "dsv4_shared_mlp_lora_kernel", "gemma4_fp8_nonexpert", "gemma4_nf4_nonexpert"),
        *("nvfp4_merge_aware", "nvfp4_merge_aware_start_step"),
    ),
    **several(
        "reward models and reinforcement learning are not there",
        *("nemo_gym_enabled", "nemo_gym_dir", "nemo_gym_auto_clone", "nemo_gym_auto_start", "nemo_gym_config_paths"),
        *("nemo_gym_head_port", "nemo_gym_server_timeout", "nemo_gym_verify_timeout", "nemo_gym_run_timeout"),
        *("nemo_gym_datasets", "nemo_gym_model_name", "nemo_gym_multi_turn", "nemo_gym_max_turns"),
    ),
    **several("the launcher says it", "world_size", "local_rank", "ddp"),
    **{name: TRAINER[name] for name in TRAINER if name.startswith("ddp_")},
    **several("`triaxis submit` starts a run on a cluster", "use_ray", "ray_run_name", "resources_per_worker"),
    "ray_num_workers": none("`triaxis submit` starts a run on a cluster", default=1),
    # records, evaluations, checkpoints
    "output_dir": joint("run.dir", default="./model-out"),
    "hub_model_id": none(HUB),
    "hub_strategy": none(HUB),
    "hub_revision": none(HUB),
    "save_safetensors": none("it is always so here", default=True),
    "logging_steps": key("train.log_every", whole),
    "eval_steps": joint("train.eval_every"),
    "eval_strategy": joint("train.eval_every"),
    "evaluation_strategy": joint("train.eval_every"),
    "evals_per_epoch": none(f"{rules.BY_DATA}: set train.eval_every", near="train.eval_every"),
    "save_steps": joint("checkpoint.every"),
    "save_strategy": joint("checkpoint.every"),
    "saves_per_epoch": none(f"{rules.BY_DATA}: set checkpoint.every", near="checkpoint.every"),
    "save_total_limit": TRAINER["save_total_limit"],
    "save_first_step": none("`triaxis check` looks at the disk before a start", near="checkpoint.every"),
    "save_only_model": TRAINER["save_only_model"],
    "early_stopping_patience": joint("train.patience"),
    **rules.BEST,
    "dynamic_checkpoint": none("a signal always leads to a checkpoint"),
    "resume_from_checkpoint": none(RESUME),
    "auto_resume_from_checkpoints": none(RESUME, default=True),
    "loss_watchdog_threshold": none("guard.on_spike watches the loss, against its own last values", near="guard.on_spike"),
    "loss_watchdog_patience": none("guard.on_spike watches the loss, against its own last values", near="guard.on_spike"),
    "use_tensorboard": key("tracking.tensorboard", yes),
    "use_wandb": joint("tracking.wandb.mode"),
    "wandb_project": joint("tracking.wandb.project"),
    "wandb_entity": key("tracking.wandb.entity", text),
    "wandb_mode": joint("tracking.wandb.mode"),
    "wandb_run_id": key("tracking.wandb.id", text),
    "wandb_name": joint("run.name"),
    "wandb_watch": none("the gradient norm is recorded, and no histograms"),
    "wandb_log_model": none("W&B gets records, not models"),
    **several(NOT_TRACKED, "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name"),
    **several(NOT_TRACKED, "hf_mlflow_log_artifacts", "use_comet", "comet_api_key", "comet_workspace", "comet_project_name"),
    **several(NOT_TRACKED, "comet_experiment_key", "comet_mode", "comet_online", "comet_experiment_config", "use_trackio"),
    **several(NOT_TRACKED, "trackio_project_name", "trackio_run_name", "trackio_space_id", "use_otel_metrics"),
    **several(NOT_TRACKED, "use_swanlab", "swanlab_project", "swanlab_experiment_name", "swanlab_mode", "swanlab_workspace"),
    **several(NOT_TRACKED, "swanlab_api_key", "swanlab_description", "swanlab_log_model"),
    **several(NOT_TRACKED, "swanlab_api_host", "swanlab_web_host", "swanlab_lark_secret", "swanlab_lark_webhook_url"),
    **several(NOT_TRACKED, "swanlab_log_completions", "swanlab_completion_log_interval", "swanlab_completion_max_buffer"),
    "otel_metrics_host": none(NOT_TRACKED, default="localhost"),
    "otel_metrics_port": none(NOT_TRACKED, default=8000),
    **several("`triaxis eval --harness` measures a trained model", "lm_eval_tasks", "lm_eval_batch_size", "lm_eval_model"),
    "lm_eval_post_train": none("`triaxis eval --harness` measures a trained model", default=True),
    **several("`triaxis eval` gives the task's figures", "do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval"),
    **several("`triaxis eval` gives the task's figures", "bench_dataset", "bench_split", "eval_table_size"),
    **several(SAMPLES, "eval_max_new_tokens", "generate_samples", "generation_top_p", "generation_top_k"),
    **{
        name: none(SAMPLES, default=default)
        for name, default in {
            **{"num_generation_samples": 3, "generation_max_new_tokens": 50, "generation_temperature": 0.7},
            **{"generation_prompt_ratio": 0.5, "generation_do_sample": True},
        }.items()
    },
    "include_tokens_per_second": none("every record has tokens_per_s"),
    "include_tkps": none("every record has tokens_per_s", default=True),
    "profiler_steps": none("deepspeed.wall_clock_breakdown has timers", near="deepspeed.wall_clock_breakdown"),
    "profiler_steps_start": none("deepspeed.wall_clock_breakdown has timers", default=0),
    "seed": key("run.seed", whole, default=42),
    "strict": none("every key is checked"),
    "trainer_cls": none("there is one trainer"),
    **several(
        "`triaxis generate` has its own flags", "gradio_title", "gradio_share", "gradio_server_name", "gradio_server_port"
    ),
    **several("`triaxis generate` has its own flags", "gradio_max_new_tokens", "gradio_temperature"),
    **several(DETECTED, "total_num_tokens", "total_supervised_tokens", "axolotl_config_path", "is_falcon_derived_model"),
    **several(DETECTED, "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"),
}


def _wandb(draft: Draft) -> None:
    """Switch W&B on where it is used or has a project, as axolotl does."""
    project = draft.read("wandb_project", text)
    if project:
        draft.put("tracking.wandb.project", project, "wandb_project")
    if project or draft.get("use_wandb"):
        mode = draft.read("wandb_mode", words({"online": "online", "offline": "offline", "disabled": "disabled"}))
        if draft.get("use_wandb") is False:
            mode = "disabled"
        names = [name for name in ("use_wandb", "wandb_project", "wandb_mode") if name in draft.given]
        draft.put("tracking.wandb.mode", mode or "online", *names)


def _dora(draft: Draft) -> None:
    use_dora(draft, "peft_use_dora")


def _sharded(draft: Draft) -> None:
    """Divide weights by ZeRO-3 where a config of FSDP does."""
    config = draft.get("fsdp_config")
    if config and "zero.stage" not in draft.values:
        draft.put("zero.stage", 3, "fsdp_config")
    if isinstance(config, dict) and config.get("offload_params"):
        draft.put("zero.offload_param.device", "cpu", "fsdp_config")


AXOLOTL = Tool(
    "axolotl",
    ROWS,
    (
        rules.output("output_dir", "wandb_name"),
        rules.batch("micro_batch_size", "gradient_accumulation_steps"),
        rules.length("max_steps", "num_epochs"),
        rules.warmup("warmup_steps", "warmup_ratio"),
        rules.pair("optimizer.betas", "adam_beta1", "adam_beta2"),
        rules.precision("bf16", "fp16"),
        rules.interval("checkpoint.every", "save_strategy", "save_steps"),
        rules.interval("train.eval_every", "eval_strategy", "eval_steps"),
        rules.best,
        rules.patience("early_stopping_patience"),
        _wandb,
        _dora,
        deepspeed("deepspeed"),
        fsdp("fsdp"),
        _sharded,
        rules.own_tokenizer,
        sources,
        rules.chat_template("chat_template", TEMPLATES),
        rules.held_out("val_set_size"),
        rules.name_what_is_missing,
        rules.evaluate_something,
        rules.say_that_rows_are_packed("sample_packing"),
    ),
)
