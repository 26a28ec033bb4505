"""The checks of a config for a model that transformers builds, as far as they are possible without
transformers. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.redaction import printable, shown
from trainer.schema import Finding, Recipe

AUTO = "auto"
TRUST = "model.trust_remote_code"
# The keys of configs for parts that are built one by one: num_hidden_layers, n_layer, num_blocks,
# depth, num_experts, num_labels.
LAYERS = re.compile(r"(layers?|blocks?|depth|experts|labels)$")
MOST_LAYERS = 4096  # as in our own families


def folder_findings(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with the config.json of model.from_pretrained. Called again for one that
    came from the hub."""
    keys, place = ("model.from_pretrained",), f"{recipe.model.from_pretrained}: config.json"
    code = config.get("auto_map")
    if code and not recipe.model.trust_remote_code:
        yield Finding(
            keys,
            f"{place} has auto_map: the folder brings Python code of its own, which is not run unasked; legal: {TRUST} true "
            "after reading it, or no auto_map where transformers itself has this model_type",
        )
    elif code and "--" in json.dumps(code):
        yield Finding(
            keys,
            f"{place}: auto_map = {shown(code)} takes code from another repository, which model.revision does not pin: "
            "copy that code into a folder of your own",
        )
    elif recipe.model.trust_remote_code and not code:
        yield Finding((TRUST, *keys), f"{place} has no auto_map: there is no code to trust; remove {TRUST}")
    if not isinstance(config.get("model_type"), str):
        yield Finding(keys, f"{place}: model_type = {shown(config.get('model_type'))}: must be the name of a model type")
    if config.get("quantization_config"):
        yield Finding(keys, f"{place} has quantization_config: quantized weights cannot be trained; give the original ones")


def size_findings(recipe: Recipe, vocab_size: object, max_positions: object, tokenizer_size: int | None) -> Iterator[Finding]:
    """Yield where the data ask for more than the network has.

    A size that is not a number is not known here. The weights of a folder get rows for new tokens.
    """
    keys = ("model.config", "model.from_pretrained")
    fixed = recipe.model.from_pretrained is not None
    missing = tokenizer_size - vocab_size if isinstance(vocab_size, int) and tokenizer_size is not None else 0
    if missing > (len(recipe.data.new_tokens) if fixed else 0):
        remedy = "give the tokenizer that came with the weights" if fixed else f"legal: {tokenizer_size} or more"
        yield Finding(
            ("model.config.vocab_size", *keys, "data.tokenizer"),
            f"the model's vocab_size = {vocab_size} is less than the tokenizer's {tokenizer_size} symbols; {remedy}",
        )
    # XLNet: -1, no limit
    if isinstance(max_positions, int) and 0 < max_positions < recipe.data.seq_len:
        yield Finding(
            ("model.config.max_position_embeddings", "data.seq_len", *keys),
            f"the model's max_position_embeddings = {max_positions} is less than data.seq_len = {recipe.data.seq_len}; "
            f"legal: data.seq_len of at most {max_positions}",
        )


def layer_findings(config: Mapping[str, Any], below: str = "") -> Iterator[Finding]:
    """Yield where a model has so many blocks that building it would take days. `below`: the part of
    a config, such as "text_config."."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from layer_findings(value, f"{below}{key}.")
        elif isinstance(key, str) and LAYERS.search(key) and isinstance(value, int) and value > MOST_LAYERS:
            yield Finding(
                (f"model.config.{key}", "model.config", "model.from_pretrained"),
                f"the model's {below}{printable(key)} = {value}: legal are up to {MOST_LAYERS}",
            )
