"""An adapter as a folder that peft loads: adapter_config.json and adapter_model.safetensors.

peft's names are those of its modules: our logical names behind "base_model.model.", which is where
a PeftModel keeps the model that it wraps.
"""

from __future__ import annotations

from typing import Any

from trainer.files.paths import as_loaded
from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.schema import Recipe, Tuning
from trainer.tuning.builders import InPeft, builder_of
from trainer.tuning.targets import target_modules, token_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_config(recipe: Recipe, network: Network) -> dict[str, Any]:
    """Return the contents of adapter_config.json."""
    assert isinstance(network, TransformerConfig), "family auto has no tuning"
    tuning = recipe.tuning
    own = _in_peft(tuning).keys(recipe, network)
    return {
        "peft_type": own["peft_type"],
        "task_type": "CAUSAL_LM" if network.causal else None,
        "base_model_name_or_path": as_loaded(recipe.model.from_pretrained),
        "revision": recipe.model.revision,
        "inference_mode": True,
        "fan_in_fan_out": names_of(network).transposed,
        "target_modules": target_modules(tuning, network),
        **_token_keys(tuning, network),
        **own,
    }


def _in_peft(tuning: Tuning) -> InPeft:
    in_peft = builder_of(tuning).in_peft
    assert in_peft is not None, f"peft has no {tuning.method}"
    return in_peft


def _token_keys(tuning: Tuning, network: TransformerConfig) -> dict[str, Any]:
    """Return peft's keys for the rows of new tokens."""
    modules = [weight.removesuffix(".weight") for weight in token_rows(tuning, network)]
    if whole := saved_whole(tuning, network):
        stored = [name.rpartition(".")[0] for names in whole.values() for name in names]
        return {"modules_to_save": list(dict.fromkeys(stored))}
    return {"trainable_token_indices": {module: list(network.new_tokens) for module in modules}} if modules else {}


def saved_whole(tuning: Tuning, network: TransformerConfig) -> dict[str, list[str]]:
    """Return our names of the embedding and the head → their names in peft, which saves them whole
    where it cannot save the rows of single tokens.

    peft 0.21 has such rows for some methods only, and loses the bias of a head that has them.
    """
    if not token_rows(tuning, network):
        return {}
    names = names_of(network)
    has_bias = names.head_bias is not None and not network.classes
    if _in_peft(tuning).has_token_rows and not has_bias:
        return {}
    whole = {weight: [weight] for weight in token_rows(tuning, network)}
    if network.ties_head:
        whole[names.embedding].append(names.head)
    if has_bias and names.head_bias is not None:
        whole[names.head_bias] = [names.head.removesuffix("weight") + "bias"]
    return whole
