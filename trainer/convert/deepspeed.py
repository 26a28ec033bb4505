"""DeepSpeed's config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from trainer.convert import rules
from trainer.convert.deepspeed_keys import REFUSED
from trainer.convert.draft import Draft, Remark, Tool
from trainer.convert.rows import ABSENT, Reader, Row, Set, if_true, joint, key, none, number, same, text, whole, words, yes
from trainer.schema import Aio, CommsLogger, OffloadOptimizer, OffloadParam, Section, Zero

AUTO = "auto"  # in DeepSpeed's own examples: taken from the Trainer's arguments

FORMATS = ("fp32", "fp16", "bf16")
OPTIMIZERS = {
    "adamw": "adamw",
    # DeepSpeed's Adam decays weights as AdamW does, unless adam_w_mode is false
    "adam": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    **{
        name: Set({"optimizer.name": "adamw"}, "it is not there: the recipe has adamw, the nearest")
        for name in ("onebitadam", "zerooneadam", "onebitlamb", "lamb", "muon", "adagrad", "muadam", "muadamw")
    },
    "musgd": Set({"optimizer.name": "sgd"}, "it is not there: the recipe has sgd, the nearest"),
}
# DeepSpeed's rates rise from 0 and fall to 0, or to the ratio of the cosine.
SCHEDULERS = {
    "warmuplr": Set({"schedule.name": "constant"}),
    "warmupdecaylr": Set({"schedule.name": "linear", "schedule.min_lr_ratio": 0.0}),
    "warmupcosinelr": Set({"schedule.name": "cosine", "schedule.min_lr_ratio": 0.0001}),
}
NO_CYCLES = "a rate that rises and falls in cycles is not there: choose schedule.name"


def _rows_of(section: type[Section], at: str, to: str) -> Iterator[tuple[str, Row]]:
    """Yield a row for each key that a section of a recipe has by DeepSpeed's own name."""
    for name, info in section.model_fields.items():
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, Section)):
            yield f"{at}.{name}", key(f"{to}.{name}", _unless_auto(whole if info.annotation is int else same))


def _refused(section: str, at: str) -> Iterator[tuple[str, Row]]:
    """Yield a row for each key that DeepSpeed knows and a recipe may not hold."""
    for name, why in REFUSED[section].items():
        yield f"{at}{name}", none(why)


def _unless_auto(reader: Reader) -> Reader:
    """Return a reader that leaves "auto" to what the Trainer's arguments say."""
    return lambda value: Set() if value == AUTO else reader(value)


def _enabled(values: Mapping[str, object]) -> Reader:
    return _unless_auto(if_true(values))


def _old_name(name: str) -> tuple[str, Row]:
    return f"zero_optimization.{name}", key(f"zero.stage3_{name}", _unless_auto(whole))


def _static_scale(value: object) -> Set:
    scale = number(value)
    return Set({"precision.loss_scale.static": float(scale)} if scale else {})


ZERO = {
    **dict(_refused("zero", "zero_optimization.")),
    **dict(_refused("zero.offload_optimizer", "zero_optimization.offload_optimizer.")),
    **dict(_refused("zero.offload_param", "zero_optimization.offload_param.")),
    **dict(_rows_of(Zero, "zero_optimization", "zero")),
    **dict(_rows_of(OffloadOptimizer, "zero_optimization.offload_optimizer", "zero.offload_optimizer")),
    **dict(_rows_of(OffloadParam, "zero_optimization.offload_param", "zero.offload_param")),
    "zero_optimization.cpu_offload": key("zero.offload_optimizer.device", if_true({"zero.offload_optimizer.device": "cpu"})),
    "zero_optimization.cpu_offload_param": key("zero.offload_param.device", if_true({"zero.offload_param.device": "cpu"})),
    **dict(
        _old_name(name)
        for name in ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    ),
    # Triaxis has these on, as DeepSpeed has where it is not said.
    "zero_optimization.allgather_partitions": none(REFUSED["zero"]["allgather_partitions"], default=True),
    "zero_optimization.ignore_unused_parameters": none(REFUSED["zero"]["ignore_unused_parameters"], default=True),
}

PRECISION = {
    "bf16.enabled": key("precision.dtype", _enabled({"precision.dtype": "bf16"})),
    "bfloat16.enabled": key("precision.dtype", _enabled({"precision.dtype": "bf16"})),
    "bf16.immediate_grad_update": none("Triaxis sets it itself"),
    "bf16.check_grad_overflow": none("Triaxis checks it in every step", default=True),
    "bf16.bf16_master_weights_and_grads": none("master weights are always fp32"),
    "bf16.bf16_optimizer_states": none("states of the optimizer are always fp32"),
    "fp16.enabled": key("precision.dtype", _enabled({"precision.dtype": "fp16"})),
    "fp16.loss_scale": key("precision.loss_scale.static", _static_scale),
    "fp16.initial_scale_power": key("precision.loss_scale.initial_power", whole),
    "fp16.loss_scale_window": key("precision.loss_scale.window", whole),
    "fp16.hysteresis": key("precision.loss_scale.hysteresis", whole),
    "fp16.min_loss_scale": key("precision.loss_scale.minimum", whole),
    "fp16.auto_cast": none("inputs are token numbers, which are not cast"),
    "fp16.consecutive_hysteresis": none("precision.loss_scale.hysteresis counts overflows in a row", default=False),
    "fp16.fp16_master_weights_and_grads": none("master weights are always fp32"),
    "data_types.grad_accum_dtype": none("gradients always accumulate in fp32", default="fp32"),
}

TYPE = "optimizer.type"
OPTIMIZER = {
    TYPE: key("optimizer.name", words(OPTIMIZERS)),
    "optimizer.params.lr": key("optimizer.lr", _unless_auto(number)),
    "optimizer.params.betas": key("optimizer.betas", _unless_auto(same), [0.9, 0.999], within=TYPE),
    "optimizer.params.eps": key("optimizer.eps", _unless_auto(number)),
    "optimizer.params.weight_decay": key("optimizer.weight_decay", _unless_auto(number), 0.0, within=TYPE),
    "optimizer.params.momentum": key("optimizer.momentum", number),
    "optimizer.params.adam_w_mode": joint("optimizer.name"),
    "optimizer.params.torch_adam": none("the class of the update is chosen here, by device"),
    "optimizer.params.bias_correction": none("it is always corrected", default=True),
    "optimizer.params.amsgrad": none("it is not there"),
    "optimizer.params.fp32_optimizer_states": none("states of the optimizer are always fp32", default=True),
    "optimizer.legacy_fusion": none("the class of the update is chosen here, by device"),
}

SCHEDULER = {
    "scheduler.type": key("schedule.name", words(SCHEDULERS, NO_CYCLES)),
    "scheduler.params.warmup_num_steps": key("schedule.warmup_steps", _unless_auto(whole), 1000, within="scheduler.type"),
    "scheduler.params.warmup_max_lr": key("optimizer.lr", _unless_auto(number)),
    "scheduler.params.total_num_steps": key("train.steps", _unless_auto(whole)),
    "scheduler.params.cos_min_ratio": key("schedule.min_lr_ratio", number),
    "scheduler.params.warmup_min_lr": none("the warm-up begins near 0", default=0),
    "scheduler.params.warmup_min_ratio": none("the warm-up begins near 0", default=0.0),
    "scheduler.params.warmup_type": none("the warm-up is linear", default="linear"),
    "scheduler.params.last_batch_iteration": none("a run goes on where it stopped by itself", default=-1),
}

ROWS: Mapping[str, Row] = {
    **dict(_refused("deepspeed", "")),
    **ZERO,
    **PRECISION,
    **OPTIMIZER,
    **SCHEDULER,
    **dict(_rows_of(Aio, "aio", "deepspeed.aio")),
    "aio.use_gds": none(REFUSED["deepspeed.aio"]["use_gds"]),
    **dict(_rows_of(CommsLogger, "comms_logger", "deepspeed.comms_logger")),
    "communication_data_type": key("deepspeed.communication_data_type", words({name: name for name in FORMATS})),
    "wall_clock_breakdown": key("deepspeed.wall_clock_breakdown", yes),
    "memory_breakdown": key("deepspeed.memory_breakdown", yes),
    "dump_state": key("deepspeed.dump_state", yes),
    "train_batch_size": joint("batch.global_sequences"),
    "train_micro_batch_size_per_gpu": joint("batch.micro_sequences"),
    "gradient_accumulation_steps": joint("batch.global_sequences"),
    "gradient_clipping": key("train.clip_norm", _unless_auto(number), default=0.0),
    "steps_per_print": key("train.log_every", _unless_auto(whole)),
    "activation_checkpointing": joint("train.recompute"),
    "tensor_parallel.autotp_size": key("parallel.tensor", whole),
    "tensorboard.enabled": key("tracking.tensorboard", yes),
    "tensorboard.job_name": key("run.name", text),
    "tensorboard.output_path": none("the event files are in the run folder"),
    "wandb.enabled": key("tracking.wandb.mode", if_true({"tracking.wandb.mode": "online"})),
    "wandb.project": key("tracking.wandb.project", text),
    "wandb.team": key("tracking.wandb.entity", text),
    "wandb.group": none("W&B's groups are not set: tracking.wandb.tags are"),
    "csv_monitor.enabled": none(REFUSED["deepspeed"]["csv_monitor"]),
    "csv_monitor.output_path": none(REFUSED["deepspeed"]["csv_monitor"]),
    "csv_monitor.job_name": none(REFUSED["deepspeed"]["csv_monitor"]),
    "zero_allow_untested_optimizer": none("Triaxis sets it itself", default=True),
}

# Sections that do nothing unless they are switched on.
SWITCHED = ("fp16", "bf16", "bfloat16", "tensorboard", "wandb", "csv_monitor", "comms_logger")


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def forget_what_is_off(draft: Draft) -> None:
    """Remove the keys of sections that are switched off: they ask for nothing."""
    for section in SWITCHED:
        if draft.given.get(f"{section}.enabled") in (None, False, AUTO) and f"{section}.enabled" in draft.tool.rows:
            for name in [name for name in draft.given if name.startswith(f"{section}.")]:
                del draft.given[name]


def _batch(draft: Draft) -> None:
    """Bring the three sizes of which two give the third: sequences of a step = on a device at once
    × accumulation × devices."""
    asked = [name for name in SIZES if draft.given.get(name) == AUTO]
    for name in asked:
        del draft.given[name]
    total, micro, rounds = (draft.read(name, whole) for name in SIZES)
    if micro is None and total is not None:
        micro = max(1, total // ((rounds or 1) * draft.world_size))
        draft.put("batch.micro_sequences", micro, *(SIZES[::2] if rounds else SIZES[:1]), by=" / ", note=draft.ranks)
    elif micro is not None:
        draft.put("batch.micro_sequences", micro, SIZES[1])
    if total is not None:
        draft.put("batch.global_sequences", total, SIZES[0])
    elif micro is not None:
        names = SIZES[1:] if rounds else SIZES[1:2]
        draft.put("batch.global_sequences", micro * (rounds or 1) * draft.world_size, *names, by=" × ", note=draft.ranks)
    elif asked:
        draft.lacks(
            "batch.global_sequences", 'the file leaves it to the Trainer\'s arguments ("auto"): convert those, or set it'
        )


def _forget_sizes(draft: Draft) -> None:
    """Remove the sizes of the batch, which the Trainer's arguments have."""
    for name in SIZES:
        draft.given.pop(name, None)


def _adam_without_decoupling(draft: Draft) -> None:
    mode = draft.read("optimizer.params.adam_w_mode", yes)
    if mode is False and "optimizer.name" in draft.values:
        draft.put("optimizer.name", "adam", "optimizer.type", "optimizer.params.adam_w_mode")


def _recompute(draft: Draft) -> None:
    section = draft.get("activation_checkpointing")
    if section:
        draft.put("train.recompute", "full", "activation_checkpointing")
        for name, value in section.items():
            if value not in (None, False):
                why = f"{draft.place}activation_checkpointing.{name}"
                draft.missed.append(Remark(why, 'train.recompute is "full", and has no further keys'))


DEEPSPEED = Tool(
    "DeepSpeed", ROWS, (_batch, _adam_without_decoupling, _recompute, rules.name_what_is_missing), before=(forget_what_is_off,)
)
# The same, where a Trainer's file names it: what it leaves out is in the Trainer's own arguments.
BESIDE_A_TRAINER = Tool(
    "DeepSpeed",
    {name: row if row.why else replace(row, default=ABSENT) for name, row in ROWS.items()},
    (_adam_without_decoupling, _recompute),
    before=(forget_what_is_off, _forget_sizes),
)
