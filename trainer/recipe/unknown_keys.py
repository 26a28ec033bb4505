"""The message about a key that no section has: where it belongs, or which key was probably
meant."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import get_args, get_origin

from trainer.convert.deepspeed_keys import REFUSED, refusal
from trainer.recipe.marks import KeyPath, dotted
from trainer.schema import Recipe, Section
from trainer.spelling import nearest

# The names that other systems use for our keys.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_lr": "schedule.min_lr_ratio",
    "lr_scheduler": "schedule.name",
    "scheduler": "schedule.name",
    "batch_size": "batch.global_sequences",
    "global_batch_size": "batch.global_sequences",
    "micro_batch_size": "batch.micro_sequences",
    "per_device_train_batch_size": "batch.micro_sequences",
    "sequence_length": "data.seq_len",
    "seq_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_steps": "train.steps",
    "train_steps": "train.steps",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "gradient_checkpointing": "train.recompute",
    "tp": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "output_dir": "run.dir",
    "mixed_precision": "precision.dtype",
    "zero_stage": "zero.stage",
}


@cache
def known_keys() -> tuple[str, ...]:
    """Return the dotted name of every key; items of a list of objects as [0]."""
    return ("extends", *_keys_of(Recipe, ()))


def _keys_of(section: type[Section], path: KeyPath) -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        here: KeyPath = (*path, info.alias or name)
        keys.append(dotted(here))
        item = next((t for t in get_args(info.annotation) if isinstance(t, type) and issubclass(t, Section)), None)
        inner = info.annotation
        if item is not None:
            keys += _keys_of(item, (*here, 0) if get_origin(info.annotation) is list else here)
        elif isinstance(inner, type) and issubclass(inner, Section):
            keys += _keys_of(inner, here)
    return keys


def unknown_key(path: KeyPath) -> tuple[str, list[str]]:
    """Return the message about a key that is not in `schema.py`, and the keys that were probably
    meant.

    A slip of one letter in this section comes first, then a key written into the wrong section,
    then wider guesses.
    """
    section, key = path[:-1], str(path[-1])
    generic = re.sub(r"\[\d+\]", "[0]", dotted(section))
    siblings = [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == generic]
    unknown = f"unknown key {dotted(path)}"
    if reason := refusal(generic, key):
        return f"{unknown}: DeepSpeed's {key} does not belong here: {reason}", []
    if meant := nearest(key, siblings, within=1):
        return f"{unknown}; did you mean {dotted((*section, meant))}?", [dotted((*section, meant))]
    homes = [name for name in known_keys() if name.rpartition(".")[2] == key]
    if homes := homes or [home for name, home in ELSEWHERE.items() if name == key]:
        return f"{unknown}: {_belongs(key, homes)}", []
    if meant := nearest(key, siblings):
        return f"{unknown}; did you mean {dotted((*section, meant))}?", [dotted((*section, meant))]
    theirs = (
        [name for where in ("deepspeed", "zero") for name in REFUSED[where]] if generic in ("deepspeed", "zero", "") else []
    )
    if meant := nearest(key, theirs, within=2):
        return f"{unknown}; did you mean DeepSpeed's {meant}? It does not belong here: {refusal(generic, meant)}", []
    if meant := nearest(key, [name.rpartition(".")[2] for name in known_keys()]):
        return f"{unknown}; did you mean {' or '.join(n for n in known_keys() if n.rpartition('.')[2] == meant)}?", []
    return f"{unknown}; legal here: {', '.join(siblings)}", []


def _belongs(key: str, homes: list[str]) -> str:
    sections = " or ".join(f'"{home.rpartition(".")[0]}"' for home in homes)
    return f"{json.dumps(key)} belongs in {sections}: write {' or '.join(homes)}"
