"""The words of other tools in a recipe: for a key or a value of theirs, what is meant here.

They are looked up in the same tables by which `triaxis convert` goes. Here stand only the words of
systems whose configs it does not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trainer.convert.rows import NoCounterpart, Row, Set
from trainer.convert.schema_keys import schema_has
from trainer.convert.tools import TOOLS
from trainer.convert.tuning_words import TARGETS

# The names that Megatron, torchtitan, nanoGPT, peft and others have for our keys.
KEYS: Mapping[str, str] = {
    "max_lr": "optimizer.lr",
    "min_lr": "schedule.min_lr_ratio",
    "scheduler": "schedule.name",
    "batch_size": "batch.global_sequences",
    "global_batch_size": "batch.global_sequences",
    "sequence_length": "data.seq_len",
    "seq_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "block_size": "data.seq_len",
    "train_steps": "train.steps",
    "max_iters": "train.steps",
    "train_iters": "train.steps",
    "eval_interval": "train.eval_every",
    "save_interval": "checkpoint.every",
    "log_interval": "train.log_every",
    "grad_clip": "train.clip_norm",
    "clip_grad": "train.clip_norm",
    "tp": "parallel.tensor",
    "tensor_model_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "mixed_precision": "precision.dtype",
    "torch_dtype": "precision.dtype",
    "zero_stage": "zero.stage",
    "pretrained": "model.from_pretrained",
    "r": "tuning.rank",
    "peft_type": "tuning.method",
    "target_modules": "tuning.targets",
    "use_rslora": "tuning.rank_stabilized",
}
# Values that are short for others, by our key.
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "precision.dtype": {
        **{"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "no": "fp32"},
        **{"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"},
    },
    "tracking.wandb": {True: {"mode": "online"}, False: {"mode": "disabled"}},
    "tracking.wandb.mode": {True: "online", False: "disabled"},
    "train.recompute": {True: "full", False: "none"},
    "zero": {stage: {"stage": stage} for stage in range(4)},
    "guard.on_spike": {True: "warn", False: "off"},
}


@dataclass(frozen=True)
class Meaning:
    """The meaning of a word of a tool here.

    `values`: keys of a recipe with their values; {} if it asks for nothing. `why`: why it has no
    counterpart, "" if it has one. `title`: the tool's name; "" for a system whose configs are not
    read.
    """

    values: Mapping[str, Any]
    why: str = ""
    title: str = ""


def meaning(word: str, value: Any) -> Meaning | None:
    """Return what a key of another tool means with a value; None if no tool has the key.

    A counterpart in one tool goes before a key that asks for nothing in another, and that before
    the lack of one.
    """
    found = [_by_row(row, value, title) for title, row in _rows().get(word, ())]
    told = [*found]
    if word in TARGETS:
        told.insert(0, Meaning({"tuning.targets": list(TARGETS[word])}))
    if word in KEYS:
        told.insert(0, Meaning({KEYS[word]: value}))
    return min(told, key=lambda one: (not one.values, bool(one.why)), default=None)


def other_values(key: str, value: Any) -> Iterator[Any]:
    """Yield what other tools' word for a value of our key is here."""
    for word, ours in VALUES.get(key, {}).items():
        if type(word) is type(value) and word == value:
            yield ours
    if isinstance(value, str):
        for row in _rows_of(key):
            try:
                read = row.read(value)
            except NoCounterpart:
                continue
            yield read.values.get(key) if isinstance(read, Set) else read


@cache
def words() -> tuple[str, ...]:
    """Return all words of other tools that have a counterpart."""
    return tuple({*KEYS, *(word for word, rows in _rows().items() if any(not row.why for _, row in rows))})


def _by_row(row: Row, value: Any, title: str) -> Meaning:
    if row.why:
        return Meaning({}, row.why, title)
    if not schema_has(row.to):
        return Meaning({}, "this version of a recipe has no key for it", title)
    try:
        read = row.read(value)
    except NoCounterpart:
        return Meaning({row.to: value}, title=title)
    return Meaning(read.values if isinstance(read, Set) else {row.to: read}, title=title)


@cache
def _rows() -> Mapping[str, list[tuple[str, Row]]]:
    """Return each word with its rows. A word inside an object counts only if it is not also one
    outside, and means one thing: "enabled" does not."""
    outside: dict[str, list[tuple[str, Row]]] = {}
    inside: dict[str, list[tuple[str, Row]]] = {}
    for tool in TOOLS.values():
        for name, row in tool.rows.items():
            place = inside if "." in name else outside
            place.setdefault(name.rpartition(".")[2], []).append((tool.title, row))
    single = {word: rows for word, rows in inside.items() if len({row.to for _, row in rows if not row.why}) == 1}
    return single | outside


@cache
def _rows_of(key: str) -> list[Row]:
    rows = [row for tool in TOOLS.values() for row in tool.rows.values()]
    return [row for row in rows if row.to == key and not row.joint and not row.why]
