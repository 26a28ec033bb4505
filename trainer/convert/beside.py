"""The configs that a Trainer's file names beside its own keys: a DeepSpeed config, and FSDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.convert.deepspeed import BESIDE_A_TRAINER
from trainer.convert.draft import Draft, flat
from trainer.convert.reading import read_mapping
from trainer.convert.rows import listed
from trainer.convert.rules import Rule
from trainer.errors import RecipeError

# FSDP's words, and what divides the same things over the same ranks.
SHARDING: Mapping[str, Mapping[str, Any]] = {
    "full_shard": {"zero.stage": 3},
    "hybrid_shard": {"zero.stage": 3},
    "shard_grad_op": {"zero.stage": 2},
    "hybrid_shard_zero2": {"zero.stage": 2},
    "no_shard": {"zero.stage": 0},
    "offload": {"zero.offload_param.device": "cpu", "zero.offload_optimizer.device": "cpu"},
    "auto_wrap": {},
}


def deepspeed(name: str) -> Rule:
    """Return the rule of a DeepSpeed config, an object or the name of a file, which is looked for
    from here and beside the file that names it."""

    def rule(draft: Draft) -> None:
        config = draft.get(name)
        if not config:
            return
        place = f"{name}: "
        if isinstance(config, str):
            places = [Path(config), draft.folder / config, draft.folder / Path(config).name]
            file = next((place for place in places if place.is_file()), None)
            if file is None:
                draft.miss(name, "there is no such file here: bring it, or write the section zero")
                return
            try:
                config, place = read_mapping(file), f"{file.name}: "
            except RecipeError as error:
                draft.miss(name, error.lines[0])
                return
        given = dict(flat(config, BESIDE_A_TRAINER.rows))
        inner = Draft(BESIDE_A_TRAINER, given, draft.world_size, draft.folder, place)
        inner.fill()
        draft.take(inner)

    return rule


def fsdp(name: str) -> Rule:
    """Return the rule of FSDP, whose division of weights is that of ZeRO-3."""

    def rule(draft: Draft) -> None:
        value = draft.get(name)
        if not value:
            return
        for word in draft.read(name, lambda given: listed(given.replace(" ", ",") if isinstance(given, str) else given)) or []:
            if word not in SHARDING:
                draft.miss(name, f"{word} is none of {', '.join(SHARDING)}")
            for to, ours in SHARDING.get(word, {}).items():
                draft.put(to, ours, name)

    return rule
