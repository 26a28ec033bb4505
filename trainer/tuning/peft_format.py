"""An adapter as a folder that peft loads: adapter_config.json and adapter_model.safetensors.

peft's names are those of its modules: our logical names behind "base_model.model.", which is where a PeftModel keeps the
model that it wraps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.schema import Recipe, Tuning
from trainer.tuning.targets import modules_by_role, targeted_modules, token_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_config(recipe: Recipe, network: Network) -> dict[str, Any]:
    """adapter_config.json."""
    assert isinstance(network, TransformerConfig), "family auto has no tuning"
    tuning = recipe.tuning
    names = names_of(network)
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if network.causal else None,
        "base_model_name_or_path": recipe.model.from_pretrained,
        "revision": recipe.model.revision,
        "inference_mode": True,
        "fan_in_fan_out": names.transposed,
        "target_modules": target_modules(tuning, network),
        **_token_keys(tuning, network),
    }
    if tuning.method == "ia3":
        scaled_inputs = {names.attention_out.format(layer=0), names.mlp_out.format(layer=0)}
        return {"peft_type": "IA3", **shared, "feedforward_modules": target_modules(tuning, network, among=scaled_inputs)}
    shared |= {"bias": "none", "lora_alpha": tuning.alpha, "lora_dropout": tuning.dropout, "init_lora_weights": True}
    if tuning.method == "adalora":
        return {"peft_type": "ADALORA", **shared, **_budget(tuning, recipe.train.steps)}
    return {
        "peft_type": "LORA",
        **shared,
        "r": tuning.rank,
        "use_rslora": tuning.rank_stabilized,
        "use_dora": tuning.method == "dora",
    }


def _token_keys(tuning: Tuning, network: TransformerConfig) -> dict[str, Any]:
    """How peft is told of the rows of new tokens."""
    modules = [weight.removesuffix(".weight") for weight in token_rows(tuning, network)]
    if whole := saved_whole(tuning, network):
        stored = [name.rpartition(".")[0] for names in whole.values() for name in names]
        return {"modules_to_save": list(dict.fromkeys(stored))}
    return {"trainable_token_indices": {module: list(network.new_tokens) for module in modules}} if modules else {}


def saved_whole(tuning: Tuning, network: TransformerConfig) -> dict[str, list[str]]:
    """Where peft 0.21 has no rows of single tokens, embedding and head whole: our names → those of peft's modules. (IA)³ knows
    no such rows, and beside those of a head peft forgets its bias."""
    if not token_rows(tuning, network):
        return {}
    names = names_of(network)
    has_bias = names.head_bias is not None and not network.classes
    if tuning.method != "ia3" and not has_bias:
        return {}
    whole = {weight: [weight] for weight in token_rows(tuning, network)}
    if network.ties_head:
        whole[names.embedding].append(names.head)
    if has_bias and names.head_bias is not None:
        whole[names.head_bias] = [names.head.removesuffix("weight") + "bias"]
    return whole


def _budget(tuning: Tuning, steps: int) -> dict[str, Any]:
    keys = tuning.budget
    return {
        "init_r": tuning.rank,
        "target_r": keys.target_rank,
        "tinit": keys.warmup_steps,
        "tfinal": keys.final_steps,
        "deltaT": keys.every,
        "beta1": keys.betas[0],
        "beta2": keys.betas[1],
        "orth_reg_weight": keys.orthogonality,
        "total_step": steps,
    }


def trimmed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """AdaLoRA's factors without the triplets whose value is 0, and peft's pattern of those that are left of each module; {}
    where nothing has been learned yet."""
    values = {name: tensor.flatten() for name, tensor in tensors.items() if name.endswith(".lora_E")}
    if not any(tensor.any() for tensor in values.values()):
        return dict(tensors), {}
    left = {name.removesuffix(".lora_E"): value != 0 for name, value in values.items()}
    cut = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".")
        if module not in left:  # rows of new tokens
            cut[name] = tensor
            continue
        cut[name] = (tensor[:, left[module]] if factor == "lora_B" else tensor[left[module]]).contiguous()
    return cut, {f"{module.removeprefix(PREFIX)}.lora_E": kept.tolist() for module, kept in left.items()}


def target_modules(tuning: Tuning, network: TransformerConfig, *, among: Collection[str] | None = None) -> list[str]:
    """Endings of modules' names, as short as they say which is meant: "q_proj", but "attn.c_proj" where the MLP has one too.
    `among`: only of these modules of the first layer."""
    adapted = set(targeted_modules(tuning, network))
    layer = dict.fromkeys(modules_by_role(network, 0).values())
    chosen = adapted if among is None else adapted.intersection(among)
    names = names_of(network)
    of_head = filter(None, (names.head_transform, names.pooler))
    others = {module.rpartition(".")[2] for module in (*layer, *of_head) if module not in chosen}

    def ending(module: str) -> str:
        last = module.rpartition(".")[2]
        return ".".join(module.split(".")[-2:]) if last in others else last

    return sorted({ending(module) for module in layer if module in chosen})
