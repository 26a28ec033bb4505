"""The words of peft and of the tools around it for what is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.convert.draft import Draft
from trainer.convert.rows import NoCounterpart, Set, listed

EVERYTHING = ("attention", "mlp")
# The names of linear layers in Hugging Face's models → the words of tuning.targets.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "fc1": ("up",),
    "fc2": ("down",),
    "gate_up_proj": ("gate", "up"),
    "c_attn": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "W_pack": ("q", "k", "v"),
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "dense_h_to_4h": ("up",),
    "dense_4h_to_h": ("down",),
    "c_fc": ("up",),
    "all": EVERYTHING,
    "all-linear": EVERYTHING,
    "all_linear": EVERYTHING,
}


def targets(value: Any) -> list[str] | Set:
    """Return the words of tuning.targets for the names of modules; those without one are said."""
    names = listed(value)
    found = [word for name in names for word in TARGETS.get(name.rpartition(".")[2], ())]
    if not found:
        raise NoCounterpart(f"none of {', '.join(TARGETS)} is in it: set tuning.targets")
    unknown = [name for name in names if name.rpartition(".")[2] not in TARGETS]
    but = f"{', '.join(unknown)}: none of the layers that can be adapted" if unknown else ""
    return Set({"tuning.targets": list(dict.fromkeys(found))}, but)


METHODS = {"lora": "lora", "qlora": "lora", "dora": "dora", "adalora": "adalora", "ia3": "ia3"}


def use_dora(draft: Draft, name: str) -> None:
    """Make the method DoRA where its switch is on."""
    if draft.get(name) is True and draft.values.get("tuning.method"):
        draft.put("tuning.method", METHODS["dora"], name)
