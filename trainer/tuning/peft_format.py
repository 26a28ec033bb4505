"""An adapter as a folder that peft loads: adapter_config.json and adapter_model.safetensors.

peft's names are those of its modules: our logical names behind "base_model.model.", which is where a PeftModel keeps the
model that it wraps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trainer.model.config import TransformerConfig
from trainer.model.names import WEIGHT_NAMES
from trainer.model.network import Network
from trainer.sections import Recipe, Tuning
from trainer.tuning.targets import modules_by_role, targeted_modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_config(recipe: Recipe, network: Network) -> dict[str, Any]:
    """adapter_config.json."""
    assert isinstance(network, TransformerConfig), "family auto has no tuning"
    tuning = recipe.tuning
    names = WEIGHT_NAMES[network.family]
    shared = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.model.from_pretrained,
        "revision": recipe.model.revision,
        "inference_mode": True,
        "fan_in_fan_out": names.transposed,
        "target_modules": target_modules(tuning, network),
    }
    if tuning.method == "ia3":
        scaled_inputs = {names.attention_out.format(layer=0), names.mlp_out.format(layer=0)}
        return {"peft_type": "IA3", **shared, "feedforward_modules": target_modules(tuning, network, among=scaled_inputs)}
    return {
        "peft_type": "LORA",
        **shared,
        "bias": "none",
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "use_rslora": tuning.rank_stabilized,
        "use_dora": tuning.method == "dora",
        "init_lora_weights": True,
    }


def target_modules(tuning: Tuning, network: TransformerConfig, *, among: Collection[str] | None = None) -> list[str]:
    """Endings of modules' names, as short as they say which is meant: "q_proj", but "attn.c_proj" where the MLP has one too.
    `among`: only of these modules of the first layer."""
    adapted = set(targeted_modules(tuning, network))
    layer = dict.fromkeys(modules_by_role(network, 0).values())
    chosen = adapted if among is None else adapted.intersection(among)
    others = {module.rpartition(".")[2] for module in layer if module not in chosen}

    def ending(module: str) -> str:
        last = module.rpartition(".")[2]
        return ".".join(module.split(".")[-2:]) if last in others else last

    return sorted({ending(module) for module in layer if module in chosen})
