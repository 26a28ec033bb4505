"""LLaMA-Factory's config: transformers' arguments, and its own of model, data and method."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.convert import rules
from trainer.convert.draft import Draft, Tool
from trainer.convert.llamafactory_data import sources
from trainer.convert.rows import (
    Row,
    Set,
    if_true,
    joint,
    key,
    listed,
    none,
    number,
    several,
    text,
    whole,
    words,
    yes,
)
from trainer.convert.trainer_arguments import COMMON
from trainer.convert.trainer_arguments import ROWS as TRAINER_ROWS
from trainer.convert.tuning_words import targets, use_dora

RL = "reinforcement learning is not there"
STAGES = {
    "pt": "pretrain",
    "sft": "sft",
    "dpo": "preference",
    "rm": Set({"data.task": "preference"}, "a reward model is not there: the recipe learns from the same pairs by DPO"),
    "ppo": Set({"data.task": "sft"}, f"{RL}: the recipe learns the answers of the rows"),
    "kto": Set({"data.task": "sft"}, f"{RL}: the recipe learns the answers of all rows, liked or not"),
}
METHODS = {
    "lora": "lora",
    "full": Set(),
    "freeze": Set({}, "single layers cannot be frozen: the recipe trains all weights; tuning.method trains fewer"),
    "oft": Set({"tuning.method": "lora"}, "it is not there: the recipe has lora, the nearest"),
}
LOSSES = {
    "sigmoid": "dpo",
    "ipo": "ipo",
    "orpo": "orpo",
    **{
        name: Set({"preference.loss": "dpo"}, "it is not there: the recipe has dpo, the nearest")
        for name in ("hinge", "kto_pair", "simpo", "bco")
    },
}
BITS = {4: "nf4", 8: "int8", "4": "nf4", "8": "int8"}
# Names of templates. "": the tokenizer's own.
TEMPLATES = {
    **{"default": "", "empty": "", "qwen": "qwen2.5", "phi": "phi3", "gemma": "gemma2"},
    **{name: name for name in ("alpaca", "chatml", "gemma2", "gemma3", "llama2", "llama3", "mistral", "vicuna", "zephyr")},
}

OTHER_METHODS = "tuning.method has lora, dora, adalora, ia3, adapter and bitfit"
NO_MEDIA = "texts are all that is learned here"
KERNELS = "the layers and their kernels are our own"
SERVING = "`triaxis generate` has its own flags"
EXPORTS = "`triaxis export` has its own flags"
OTHER_BACKENDS = "sections parallel and zero divide a model here"
MERGE_FIRST = "merge it into its model first, and name the folder of the whole model in model.from_pretrained"
OTHER_RULES = "optimizer.name has adamw, adam, sgd, lion and adafactor"
OTHER_LOSSES = "the loss is the mean over all targets of a step"
TIMERS = "deepspeed.wall_clock_breakdown has timers"
CLUSTERS = "`triaxis submit` starts a run on a cluster"
NO_SWANLAB = "there is no mirror of metrics.jsonl in swanlab"


def _ordinary_tokens(value: object) -> Set:
    return Set({"data.new_tokens": listed(value)}, "tokens that are added are special ones here")


def _with_prefix(why: str, prefix: str, names: str) -> dict[str, Row]:
    return several(why, *(f"{prefix}_{name}" for name in names.split()))


def _revision(value: object) -> str | Set:
    return Set() if value == "main" else text(value)


OWN: Mapping[str, Row] = {
    # model
    "model_name_or_path": key("model.from_pretrained", text),
    "model_revision": key("model.revision", _revision),
    "trust_remote_code": none(
        'code of a model runs only with model.family "auto" and a model.revision; our families need none'
    ),
    **several(MERGE_FIRST, "adapter_name_or_path", "adapter_folder", "create_new_adapter"),
    "cache_dir": none("HF_HOME in the environment says where downloads are kept"),
    "use_fast_tokenizer": none("tokenizers are those of the library tokenizers", default=True),
    "resize_vocab": none("rows of new tokens are added as data.new_tokens needs them"),
    "split_special_tokens": key("data.special_tokens", if_true({"data.special_tokens": "text"})),
    "add_tokens": key("data.new_tokens", _ordinary_tokens),
    "add_special_tokens": key("data.new_tokens", listed),
    "new_special_tokens_config": none("name the tokens in data.new_tokens", near="data.new_tokens"),
    "init_special_tokens": none("rows of new tokens begin at the mean of the others", default="noise_init"),
    "low_cpu_mem_usage": none("weights are read tensor by tensor", default=True),
    "rope_scaling": none("positions are those of model.from_pretrained; a new model has model.config.rope_scaling"),
    "flash_attn": none(KERNELS, default="auto"),
    "disable_gradient_checkpointing": joint("train.recompute", default=False),
    "train_from_scratch": none("write model.family and model.config in place of model.from_pretrained", near="model.family"),
    "upcast_layernorm": none("master weights are fp32", default=False),
    "upcast_lmhead_output": none("the loss is computed in fp32", default=False),
    "moe_aux_loss_coef": none("mixtures of experts are not trained here"),
    "use_reentrant_gc": none("train.recompute has no further keys", default=True),
    "print_param_status": none("the start of a run says what is trained"),
    **several(KERNELS, "use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels"),
    **several("attention sees the whole sequence", "shift_attn", "mixture_of_depths"),
    **several("HF_TOKEN in the environment is read", "hf_hub_token", "ms_hub_token", "om_hub_token"),
    "quantization_bit": key("tuning.quantize", words(BITS, "weights are frozen in 4 or 8 bits: set tuning.quantize")),
    "quantization_method": none("weights are quantized here, without a library", default="bnb"),
    "quantization_type": none('4 bits are "nf4"', default="nf4", near="tuning.quantize"),
    "double_quantization": none("the scales of blocks are not quantized again", default=True),
    "quantization_device_map": none("sections parallel and zero place weights"),
    # method
    "stage": key("data.task", words(STAGES), default="sft"),
    "finetuning_type": key("tuning.method", words(METHODS), default="lora"),
    "lora_rank": key("tuning.rank", whole, default=8),
    "lora_alpha": key("tuning.alpha", number),
    "lora_dropout": key("tuning.dropout", number, default=0.0),
    "lora_target": key("tuning.targets", targets, default="all"),
    "use_rslora": key("tuning.rank_stabilized", yes),
    "use_dora": joint("tuning.method"),
    "additional_target": none("only the rows of data.new_tokens are trained beside an adapter", near="data.new_tokens"),
    **several("both factors have one learning rate", "loraplus_lr_ratio"),
    "loraplus_lr_embedding": none("both factors have one learning rate", default=1e-6),
    "pissa_init": none("factors begin as in LoRA: one at random, one at 0"),
    "pissa_iter": none("factors begin as in LoRA: one at random, one at 0", default=16),
    "pissa_convert": none("factors begin as in LoRA: one at random, one at 0"),
    "freeze_trainable_layers": none(OTHER_METHODS, default=2),
    "freeze_trainable_modules": none(OTHER_METHODS, default="all"),
    "freeze_extra_modules": none(OTHER_METHODS),
    "module_dropout": none(OTHER_METHODS, default=0.0),
    "oft_rank": none(OTHER_METHODS, default=0),
    "oft_block_size": none(OTHER_METHODS, default=32),
    "oft_target": none(OTHER_METHODS, default="all"),
    "use_llama_pro": none(OTHER_METHODS),
    "pure_bf16": key(
        "precision.dtype", if_true({"precision.dtype": "bf16"}, "master weights and states of the optimizer are fp32 here")
    ),
    "pref_beta": key("preference.beta", number, default=0.1),
    "pref_loss": key("preference.loss", words(LOSSES), default="sigmoid"),
    "dpo_label_smoothing": key("preference.label_smoothing", number, default=0.0),
    "pref_ftx": none("the loss of the chosen answer is not added; preference.loss orpo has it", default=0.0),
    "pref_bco_weight": none("preference.loss has dpo, ipo and orpo", default=0.0),
    "simpo_gamma": none("preference.loss has dpo, ipo and orpo", default=0.5),
    "ld_alpha": none("preference.loss has dpo, ipo and orpo"),
    "kto_chosen_weight": none("preference.loss has dpo, ipo and orpo", default=1.0),
    "kto_rejected_weight": none("preference.loss has dpo, ipo and orpo", default=1.0),
    **several("the reference is the model before training", "ref_model", "ref_model_adapters", "ref_model_quantization_bit"),
    **several(RL, "reward_model", "reward_model_adapters", "reward_model_quantization_bit"),
    "reward_model_type": none(RL, default="lora"),
    **several(RL, "ppo_score_norm", "ppo_whiten_rewards"),
    "ppo_buffer_size": none(RL, default=1),
    "ppo_epochs": none(RL, default=4),
    "ppo_target": none(RL, default=6.0),
    **several(OTHER_RULES, "use_galore", "use_apollo", "use_badam"),
    **several(OTHER_RULES, "use_adam_mini", "use_muon"),
    **_with_prefix(OTHER_RULES, "galore", "target rank update_interval scale proj_type layerwise"),
    **_with_prefix(OTHER_RULES, "apollo", "target rank update_interval scale proj proj_type scale_type layerwise scale_front"),
    **_with_prefix(OTHER_RULES, "badam", "mode start_block switch_mode switch_interval update_ratio mask_mode verbose"),
    **_with_prefix(
        OTHER_BACKENDS,
        "kt",
        "cpu_activation weight_path non_expert_weight_path expert_checkpoint_path use_lora_experts lora_expert_num "
        "lora_expert_intermediate_size",
    ),
    **several(OTHER_LOSSES, "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    "asft_alpha": none(OTHER_LOSSES, default=0.1),
    "eaft_alpha": none(OTHER_LOSSES, default=1.0),
    **several(OTHER_BACKENDS, "use_mca", "use_megatron_bridge", "use_hyper_parallel", "hyper_parallel_args", "use_kt"),
    "hyper_parallel_cp_size": none("sequences are not divided over ranks yet", default=1),
    "freeze_vision_tower": none(NO_MEDIA, default=True),
    "freeze_multi_modal_projector": none(NO_MEDIA, default=True),
    "freeze_language_model": none(NO_MEDIA, default=False),
    "compute_accuracy": none("an evaluation gives the task's figures"),
    "disable_shuffling": none("sequences are drawn at random, by run.seed", near="run.seed"),
    "early_stopping_steps": joint("train.patience"),
    "plot_loss": none("report.html has the curves", idle=(True,)),
    "overwrite_output_dir": none("a run folder is never overwritten: the run in it goes on", idle=(True,)),
    "include_effective_tokens_per_second": none("every record has tokens_per_s"),
    "use_swanlab": none(NO_SWANLAB),
    "swanlab_project": none(NO_SWANLAB, default="llamafactory"),
    "swanlab_mode": none(NO_SWANLAB, default="cloud"),
    **several(NO_SWANLAB, "swanlab_workspace", "swanlab_run_name", "swanlab_api_key", "swanlab_logdir"),
    **several(NO_SWANLAB, "swanlab_lark_webhook_url", "swanlab_lark_secret"),
    # data
    "dataset": joint("data.sources"),
    "eval_dataset": joint("data.eval_sources"),
    "dataset_dir": joint("data.sources", default="data"),
    "template": joint("data.chat_template"),
    "cutoff_len": key("data.seq_len", whole, default=2048),
    "train_on_prompt": key("data.learn", if_true({"data.learn": "all"})),
    "mask_history": key("data.learn", if_true({"data.learn": "last"})),
    "max_samples": joint("data.max_rows"),
    "val_size": joint("data.eval_fraction", default=0.0),
    "interleave_probs": joint("data.sources[0].weight"),
    "mix_strategy": none("sources are mixed by size, or by weight", default="concat", near="data.sources[0].weight"),
    "preprocessing_num_workers": key("data.workers", whole),
    "preprocessing_batch_size": none("data.workers is all there is to it", default=1000),
    "packing": none("rows are always packed, and do not see each other", idle=(True,)),
    "neat_packing": key("data.isolate_documents", if_true({"data.isolate_documents": True})),
    "tool_format": none("tools are written by the tokenizer's chat template"),
    "default_system": none("a row's field system has it"),
    "enable_thinking": none('thoughts are written by the template: a row has {"chat_template_kwargs": …}', default=True),
    "preserve_thinking": none("thoughts are written by the template"),
    "tokenized_path": none("tokenized data lies in data.cache_dir, by its contents", near="data.cache_dir"),
    "overwrite_cache": none("tokenized data is used again while its sources are the same", idle=(True,)),
    "data_shared_file_system": none("data.cache_dir is shared by all nodes", idle=(True,)),
    "media_dir": none(NO_MEDIA),
    "streaming": none("rows are tokenized ahead of training, to the disk"),
    "buffer_size": none("rows are tokenized ahead of training, to the disk", default=16384),
    "eval_num_beams": none("train.beams is for data.task translate", near="train.beams"),
    "eval_on_each_dataset": none("held-out rows of all sources make one figure"),
    "ignore_pad_token_for_loss": none("filler is never a target", default=True),
    "image_max_pixels": none(NO_MEDIA, default=768 * 768),
    "image_min_pixels": none(NO_MEDIA, default=32 * 32),
    "video_max_pixels": none(NO_MEDIA, default=256 * 256),
    "video_min_pixels": none(NO_MEDIA, default=16 * 16),
    "video_fps": none(NO_MEDIA, default=2.0),
    "video_maxlen": none(NO_MEDIA, default=128),
    "audio_sampling_rate": none(NO_MEDIA, default=16000),
    **several(NO_MEDIA, "image_do_pan_and_scan", "crop_to_patches", "use_audio_in_video"),
    # what is done afterwards, and elsewhere
    **several(SERVING, "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens"),
    **several(SERVING, "repetition_penalty", "length_penalty", "skip_special_tokens", "infer_backend", "infer_dtype"),
    **several(SERVING, "offload_folder", "use_kv_cache", "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager"),
    **several(SERVING, "vllm_max_lora_rank", "vllm_config", "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size"),
    **several(SERVING, "sglang_config", "sglang_lora_backend"),
    **several(EXPORTS, "export_dir", "export_size", "export_device", "export_quantization_bit", "export_legacy_format"),
    **several(EXPORTS, "export_quantization_dataset", "export_quantization_nsamples", "export_quantization_maxlen"),
    **several(EXPORTS, "export_hub_model_id"),
    "ray_num_workers": none(CLUSTERS, default=1),
    **several(CLUSTERS, "ray_init_kwargs", "master_addr", "master_port"),
    **several("fp8 is not there", "fp8", "fp8_enable_fsdp_float8_all_gather"),
    "fp8_backend": none("fp8 is not there", default="auto"),
    **_with_prefix(TIMERS, "profiler", "wait_steps warmup_steps active_steps repeat record_shapes profile_memory with_stack"),
    **several(TIMERS, "enable_torch_profiler", "profiler_output_dir", "profile_modules"),
}


def _alpha_by_rank(draft: Draft) -> None:
    if "lora_alpha" not in draft.given and (rank := draft.read("lora_rank", whole)):
        draft.put("tuning.alpha", float(2 * rank), "lora_rank", by=" × ", note="2, as where lora_alpha is not given")


def _dora(draft: Draft) -> None:
    use_dora(draft, "use_dora")


def _recompute_unless_disabled(draft: Draft) -> None:
    if draft.get("disable_gradient_checkpointing"):
        draft.put("train.recompute", "none", "disable_gradient_checkpointing")
    else:
        draft.put("train.recompute", "full", "disable_gradient_checkpointing")


LLAMAFACTORY = Tool(
    "LLaMA-Factory",
    {**TRAINER_ROWS, **OWN},
    (
        *COMMON,
        _alpha_by_rank,
        _dora,
        _recompute_unless_disabled,
        rules.own_tokenizer,
        sources,
        rules.max_rows("max_samples"),
        rules.chat_template("template", TEMPLATES),
        rules.patience("early_stopping_steps"),
        rules.held_out("val_size"),
        rules.name_what_is_missing,
        rules.evaluate_something,
        rules.say_that_rows_are_packed("packing", "neat_packing"),
    ),
)
