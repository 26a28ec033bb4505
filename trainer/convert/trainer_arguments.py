"""The arguments of transformers' Trainer, as `TrainingArguments.to_dict()` writes them, and those
that TRL's SFTConfig and DPOConfig add."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.convert import rules
from trainer.convert.beside import deepspeed, fsdp
from trainer.convert.draft import Draft, Tool
from trainer.convert.rows import Row, Set, joint, key, none, number, whole, words, yes

# Fewer bits of states save memory, which offloading them does here.
FEWER_BITS = 'its states are fp32 here; zero.offload_optimizer {"device": "cpu"} takes them off the GPU'


def _nearest(name: str, why: str) -> Set:
    return Set({"optimizer.name": name}, f"{why}: the recipe has {name}, the nearest")


NOT_THERE = "it is not there"
OPTIMIZERS: Mapping[str, str | Set] = {
    "sgd": "sgd",
    "adafactor": "adafactor",
    **dict.fromkeys(
        (
            *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"),
            *("adamw_hf", "adamw_anyprecision", "adamw", "paged_adamw_32bit", "paged_adamw", "optimi_adamw", "flash_adamw"),
        ),
        "adamw",
    ),
    **dict.fromkeys(
        (
            *("adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ao_adamw_4bit"),
            *("ao_adamw_8bit", "ao_adamw_fp8"),
        ),
        Set({"optimizer.name": "adamw"}, FEWER_BITS),
    ),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "lion", "lion_pytorch", "flash_lion"), "lion"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), Set({"optimizer.name": "lion"}, FEWER_BITS)),
    **dict.fromkeys(("flash_sgd", "flash_sgdw", "schedule_free_sgd", "sinkgd"), _nearest("sgd", NOT_THERE)),
    **dict.fromkeys(("galore_adafactor", "galore_adafactor_layerwise"), _nearest("adafactor", NOT_THERE)),
    **dict.fromkeys(
        (
            *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adagrad", "rmsprop", "rmsprop_bnb"),
            *("rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw"),
            *("apollo_adamw", "apollo_adamw_layerwise", "stable_adamw", "adopt_adamw", "came_pytorch", "muon", "dion"),
            *("flash_adam", "q_galore_adamw8bit"),
        ),
        _nearest("adamw", NOT_THERE),
    ),
}


def _schedule(name: str, least: float | None, but: str = "") -> Set:
    ratio = {} if least is None else {"schedule.min_lr_ratio": least}
    return Set({"schedule.name": name, **ratio}, but)


# transformers' rates end at 0 unless a word or a further key says otherwise.
SCHEDULES: Mapping[str, Set] = {
    "linear": _schedule("linear", 0.0),
    "cosine": _schedule("cosine", 0.0),
    "constant": _schedule("constant", None),
    "constant_with_warmup": _schedule("constant", None),
    "inverse_sqrt": _schedule("inverse_sqrt", None),
    "warmup_stable_decay": _schedule("wsd", 0.0),
    "cosine_with_min_lr": _schedule("cosine", 0.0),
    "cosine_warmup_with_min_lr": _schedule("cosine", 0.0),
    "polynomial": _schedule("linear", 0.0, "a power of 1, a straight line, is there"),
    "cosine_with_restarts": _schedule("cosine", 0.0, "there are no restarts: it is one cosine"),
    "reduce_lr_on_plateau": _schedule("constant", None, "rates are a function of the step alone: the recipe keeps it constant"),
    "greedy": _schedule("constant", None, "rates are a function of the step alone: the recipe keeps it constant"),
}

TRUST = none('a model\'s code runs only with model.family "auto" and a model.revision; our families have none')
DATA_AHEAD = "rows are tokenized and packed ahead of training; data.workers is the number of processes that do it"
HUB = "a run's export is a folder: upload it by hand"
ALWAYS = "it is always so here"
DISTRIBUTED = "collectives are set up here, for every layout"
NO_EVALUATION = "an evaluation gives the task's figures, by batches of batch.micro_sequences"
RESUME = "the same command goes on by itself, or from --resume PATH"
RECORDS = "every record of metrics.jsonl has all its figures"
MAIN_RECORDS = "what is said is in logs/rank-*.log"

ROWS: Mapping[str, Row] = {
    # how long, and by how much at once
    "output_dir": joint("run.dir"),
    "run_name": joint("run.name"),
    "per_device_train_batch_size": joint("batch.micro_sequences", default=8),
    "per_gpu_train_batch_size": joint("batch.micro_sequences"),
    "gradient_accumulation_steps": joint("batch.global_sequences", default=1),
    "auto_find_batch_size": none(
        "write train.auto_micro_batch true in place of batch.micro_sequences: the largest is then tried"
    ),
    "num_train_epochs": joint("train.epochs", default=3.0),
    "max_steps": joint("train.steps", default=-1),
    # the update
    "learning_rate": key("optimizer.lr", number, default=5e-5),
    "optim": key("optimizer.name", words(OPTIMIZERS), default="adamw_torch_fused"),
    "optim_args": none("the keys of section optimizer are all that an update rule reads"),
    "optim_target_modules": none("all weights have one update rule"),
    "adafactor": none('write optimizer.name "adafactor"', default=False),
    "weight_decay": key("optimizer.weight_decay", number, default=0.0),
    "adam_beta1": joint("optimizer.betas", default=0.9),
    "adam_beta2": joint("optimizer.betas", default=0.999),
    "adam_epsilon": key("optimizer.eps", number, default=1e-8),
    "max_grad_norm": key("train.clip_norm", number, default=1.0),
    "label_smoothing_factor": key("train.label_smoothing", number, default=0.0),
    "average_tokens_across_devices": none("a loss is always averaged over all targets of a step", default=True),
    "neftune_noise_alpha": none("noise on embeddings is not there"),
    "lr_scheduler_type": key("schedule.name", words(SCHEDULES), default="linear"),
    "lr_scheduler_kwargs.min_lr_rate": key("schedule.min_lr_ratio", number),
    "lr_scheduler_kwargs.min_lr_ratio": key("schedule.min_lr_ratio", number),
    "lr_scheduler_kwargs.min_lr": joint("schedule.min_lr_ratio"),
    "lr_scheduler_kwargs.num_decay_steps": key("schedule.decay_steps", whole),
    "lr_scheduler_kwargs.num_cycles": none("a cosine here is half a cycle", default=0.5),
    "lr_scheduler_kwargs.power": none("the line is straight", default=1.0),
    "lr_scheduler_kwargs.lr_end": none("schedule.min_lr_ratio is the rate at the end / the peak", near="schedule.min_lr_ratio"),
    "warmup_steps": joint("schedule.warmup_steps", default=0),
    "warmup_ratio": joint("schedule.warmup_steps", default=0.0),
    # formats and memory
    "bf16": key("precision.dtype", words({True: Set({"precision.dtype": "bf16"}), False: Set()}), default=False),
    "fp16": key("precision.dtype", words({True: Set({"precision.dtype": "fp16"}), False: Set()}), default=False),
    "bf16_full_eval": none("evaluation has the format of training", default=False),
    "fp16_full_eval": none("evaluation has the format of training", default=False),
    "tf32": joint("precision.matmul"),
    "fp16_opt_level": none("precision.dtype is all there is", default="O1"),
    "half_precision_backend": none("precision.dtype is all there is", default="auto"),
    "gradient_checkpointing": key("train.recompute", words({True: Set({"train.recompute": "full"}), False: Set()})),
    "activation_checkpointing": key("train.recompute", words({True: Set({"train.recompute": "full"}), False: Set()})),
    "gradient_checkpointing_kwargs": none("train.recompute has no further keys"),
    "activation_checkpointing_kwargs": none("train.recompute has no further keys"),
    "torch_compile": none("layers are not compiled"),
    "torch_compile_backend": none("layers are not compiled"),
    "torch_compile_mode": none("layers are not compiled"),
    "use_liger_kernel": none("the layers are our own"),
    "liger_kernel_config": none("the layers are our own"),
    "use_cache": none("keys and values are kept in generation only"),
    "torch_empty_cache_steps": none("torch's allocator is left alone"),
    "jit_mode_eval": none("layers are not compiled"),
    # records, evaluations, checkpoints
    "logging_strategy": joint("train.log_every", default="steps"),
    "logging_steps": joint("train.log_every", default=500),
    "logging_first_step": none("step 1 is recorded", default=False),
    "logging_dir": none("records are in the run folder"),
    "logging_nan_inf_filter": none("a loss that is not finite is recorded as it is", default=True),
    "log_on_each_node": none(MAIN_RECORDS, default=True),
    "log_level": none(MAIN_RECORDS, default="passive"),
    "log_level_replica": none(MAIN_RECORDS, default="warning"),
    "disable_tqdm": none("the console shows a line per record", default=False),
    "include_num_input_tokens_seen": none(RECORDS, default="no"),
    "include_tokens_per_second": none(RECORDS),
    "report_to": joint("tracking", read=words({name: Set(keys) for name, keys in rules.TRACKERS.items()})),
    "project": none("a tracker's project is tracking.wandb.project", default="huggingface", near="tracking.wandb.project"),
    "trackio_space_id": none("there is no mirror of metrics.jsonl in trackio"),
    "trackio_bucket_id": none("there is no mirror of metrics.jsonl in trackio"),
    "trackio_static_space_id": none("there is no mirror of metrics.jsonl in trackio"),
    "eval_strategy": joint("train.eval_every", default="no"),
    "evaluation_strategy": joint("train.eval_every"),
    "eval_steps": joint("train.eval_every"),
    "eval_delay": none("evaluations come every train.eval_every steps from the first on", default=0),
    "eval_on_start": none("`triaxis eval` measures a model before training", default=False),
    "per_device_eval_batch_size": none(NO_EVALUATION, default=8, near="batch.micro_sequences"),
    "prediction_loss_only": none(NO_EVALUATION, default=False),
    "eval_do_concat_batches": none(NO_EVALUATION, default=True),
    "eval_use_gather_object": none(NO_EVALUATION, default=False),
    "eval_accumulation_steps": none(NO_EVALUATION),
    "include_for_metrics": none(NO_EVALUATION),
    "batch_eval_metrics": none(NO_EVALUATION, default=False),
    "save_strategy": joint("checkpoint.every", default="steps"),
    "save_steps": joint("checkpoint.every", default=500),
    "save_total_limit": key("checkpoint.keep", whole),
    "save_only_model": none("a checkpoint has what a run goes on from; `triaxis export` writes the model alone", default=False),
    "save_safetensors": none(ALWAYS, default=True),
    "save_on_each_node": none("a run has one folder, which all nodes share", default=False),
    "enable_jit_checkpoint": none("a signal always leads to a checkpoint", default=False),
    **rules.BEST,
    "push_to_hub": none(HUB, default=False),
    "hub_token": none(HUB, default="<HUB_TOKEN>"),
    "push_to_hub_token": none(HUB, default="<PUSH_TO_HUB_TOKEN>"),
    "hub_private_repo": none(HUB),
    "hub_model_id": none(HUB),
    "hub_strategy": none(HUB, default="every_save"),
    "hub_always_push": none(HUB, default=False),
    "hub_revision": none(HUB),
    "resume_from_checkpoint": none(RESUME),
    "overwrite_output_dir": none("a run folder is never overwritten: the run in it goes on"),
    "ignore_data_skip": none("a run goes on with the data that comes next", default=False),
    "restore_callback_states_from_checkpoint": none(RESUME, default=False),
    # chance
    "seed": key("run.seed", whole, default=42),
    "data_seed": none("one seed, run.seed, draws everything", near="run.seed"),
    "full_determinism": key("run.deterministic", yes),
    # data
    "dataloader_drop_last": none("the order of data does not depend on batches", default=False),
    "dataloader_num_workers": none(DATA_AHEAD, default=0, near="data.workers"),
    "dataloader_pin_memory": none(DATA_AHEAD, default=True),
    "dataloader_persistent_workers": none(DATA_AHEAD, default=False),
    "dataloader_prefetch_factor": none(DATA_AHEAD),
    "dataloader_multiprocessing_context": none(DATA_AHEAD),
    "dataloader_in_order": none(DATA_AHEAD, default=True),
    "remove_unused_columns": none("keys of rows that nothing reads are counted at the start", default=True),
    "label_names": none("the task knows its targets"),
    "train_sampling_strategy": none("sequences are drawn at random, by run.seed", default="random"),
    "group_by_length": none("rows are packed to full sequences", default=False),
    "length_column_name": none("rows are packed to full sequences", default="length"),
    # devices
    "use_cpu": none("DS_ACCELERATOR=cpu in the environment keeps a run off the GPUs", default=False),
    "no_cuda": none("DS_ACCELERATOR=cpu in the environment keeps a run off the GPUs", default=False),
    "local_rank": none("the launcher says it", default=-1),
    **{
        f"accelerator_config.{name}": none(DISTRIBUTED, default=default)
        for name, default in {
            **{"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True},
            **{"non_blocking": False, "gradient_accumulation_kwargs": None, "use_configured_state": False},
        }.items()
    },
    "parallelism_config": none("write the section parallel", near="parallel"),
    "ddp_find_unused_parameters": none(DISTRIBUTED),
    "ddp_bucket_cap_mb": none("write zero.reduce_bucket_size, in elements", near="zero.reduce_bucket_size"),
    "ddp_broadcast_buffers": none(DISTRIBUTED),
    "ddp_static_graph": none(DISTRIBUTED),
    "ddp_backend": none(DISTRIBUTED),
    "ddp_timeout": none("a rank that hangs is found after guard.timeout_s", default=1800, near="guard.timeout_s"),
    "fsdp": joint("zero.stage"),
    "fsdp_config": none("zero.stage 3 divides weights as FSDP does, without further keys", near="zero"),
    "fsdp_min_num_params": none("zero.stage 3 divides weights as FSDP does, without further keys", default=0),
    "fsdp_transformer_layer_cls_to_wrap": none("zero.stage 3 divides weights as FSDP does, without further keys"),
    "deepspeed": joint("zero"),
    "debug": none("a page that names the rank at fault is written on its own"),
    "skip_memory_metrics": none(RECORDS, default=True),
    # what a script does
    "do_train": none("`triaxis train` trains", default=False, idle=(True,)),
    "do_eval": none("evaluations come every train.eval_every steps, and at the end", default=False, idle=(True,)),
    "do_predict": none("`triaxis eval` and `triaxis generate` take a run", default=False),
    "predict_with_generate": none("`triaxis eval` and `triaxis generate` take a run", default=False),
    "generation_max_length": none("`triaxis generate --tokens` says it"),
    "generation_num_beams": none("train.beams is for data.task translate", near="train.beams"),
    "generation_config": none("`triaxis generate` has its own flags"),
    "sortish_sampler": none("rows are packed to full sequences", default=False),
    "use_legacy_prediction_loop": none(NO_EVALUATION, default=False),
    "past_index": none("there is no state between sequences", default=-1),
    "mp_parameters": none(DISTRIBUTED, default=""),
    "ray_scope": none("searches are not there", default="last"),
    "tpu_num_cores": none("there are no TPUs here"),
    "tpu_metrics_debug": none("there are no TPUs here", default=False),
    "split_batches": none(DISTRIBUTED),
    "include_inputs_for_metrics": none(NO_EVALUATION, default=False),
}

# What TRL's SFTConfig and DPOConfig have beside.
TRL: Mapping[str, Row] = {
    "max_length": key("data.seq_len", whole),
    "max_seq_length": key("data.seq_len", whole),
    "max_prompt_length": none("a prompt and its answer together have data.seq_len tokens", near="data.seq_len"),
    "max_completion_length": none("a prompt and its answer together have data.seq_len tokens", near="data.seq_len"),
    "dataset_text_field": none("data.sources[].field names it", default="text", near="data.sources[0].field"),
    "dataset_num_proc": key("data.workers", whole),
    "packing": none("rows are always packed, and do not see each other", default=True),
    "eval_packing": none("rows are always packed, and do not see each other", default=True),
    "packing_strategy": none("rows are packed by best fit", default="bfd"),
    "padding_free": none(ALWAYS, default=True),
    "completion_only_loss": none('data.learn is "answers" unless it says otherwise', default=True, near="data.learn"),
    "assistant_only_loss": none('data.learn is "answers" unless it says otherwise', default=True, near="data.learn"),
    "beta": key("preference.beta", number),
    "label_smoothing": key("preference.label_smoothing", number),
    "trust_remote_code": TRUST,
    "chat_template_path": none("conversations are written by the tokenizer's own chat template"),
    "model_init_kwargs": none("the keys of section model are all that loading reads"),
}


def _rate_at_the_end(draft: Draft) -> None:
    least, peak = draft.read("lr_scheduler_kwargs.min_lr", number), draft.read("learning_rate", number)
    if least is not None and peak:
        draft.put("schedule.min_lr_ratio", least / peak, "lr_scheduler_kwargs.min_lr", by=" / ", note=f"learning_rate {peak:g}")


COMMON = (
    rules.output("output_dir", "run_name"),
    rules.batch("per_device_train_batch_size", "gradient_accumulation_steps"),
    rules.length("max_steps", "num_train_epochs"),
    rules.warmup("warmup_steps", "warmup_ratio"),
    rules.pair("optimizer.betas", "adam_beta1", "adam_beta2"),
    _rate_at_the_end,
    rules.precision("bf16", "fp16"),
    rules.interval("train.log_every", "logging_strategy", "logging_steps", no=1),
    rules.interval("checkpoint.every", "save_strategy", "save_steps"),
    rules.interval("train.eval_every", "eval_strategy", "eval_steps", otherwise="logging_steps"),
    rules.best,
    rules.trackers("report_to"),
    deepspeed("deepspeed"),
    fsdp("fsdp"),
)

TRAINER = Tool("transformers", {**ROWS, **TRL}, (*COMMON, rules.name_what_is_missing, rules.evaluate_something))
