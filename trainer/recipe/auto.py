"""Family "auto": what a recipe may ask of a model that transformers builds, as far as it shows without transformers.

What only transformers knows (whether it has the model type, the keys of its config class) is said when training starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError
from trainer.model.config_file import read_config
from trainer.model.families import FAMILIES
from trainer.recipe.names import exists, tokenizer_vocab_size
from trainer.recipe.places import printable, shown
from trainer.sections import Finding, Recipe

AUTO = "auto"
AXES = ("tensor", "pipeline", "context")
COMMIT = re.compile(r"[0-9a-f]{40}")
TRUST = "model.trust_remote_code"
# Rates of dropout, by the words in Hugging Face's names: of all keys only these change neither shapes nor what the loaded
# weights compute.
DROPOUT = ("dropout", "pdrop")
# How configs call what is built one by one: num_hidden_layers, n_layer, num_blocks, depth, num_experts, num_labels.
LAYERS = re.compile(r"(layers?|blocks?|depth|experts|labels)$")
MOST_LAYERS = 4096  # as in the families that are our own


def auto_findings(recipe: Recipe) -> Iterator[Finding]:
    """Keys that go with no family but "auto", or do not go with it."""
    model = recipe.model
    if model.family != AUTO:
        if model.trust_remote_code:
            yield Finding((TRUST, "model.family"), f'{TRUST} is used only with model.family "auto": remove it')
        return
    for axis in AXES:
        if (degree := getattr(recipe.parallel, axis)) > 1:
            yield Finding(
                (f"parallel.{axis}", "model.family"),
                f'parallel.{axis} = {degree}: a model of family "auto" is transformers\' own and only data parallelism and '
                f"ZeRO divide it; legal: 1, or a family whose layers divide: {', '.join(FAMILIES)}",
            )
    if recipe.data.task == "translate":
        yield Finding(
            ("model.family", "data.task"),
            'data.task "translate" learns with an encoder and a decoder of our own, which family "auto" does not have: take a '
            f"family that translates: {', '.join(family.name for family in FAMILIES.values() if family.translates)}",
        )
    if recipe.train.recompute == "selective":
        yield Finding(
            ("train.recompute", "model.family"),
            'train.recompute = "selective" needs our own attention, which family "auto" has not; legal: "none", "full"',
        )
    if model.trust_remote_code:
        yield from _trust_findings(recipe)


def _trust_findings(recipe: Recipe) -> Iterator[Finding]:
    """Code that may change under the run, or comes from nowhere, is not run."""
    name, revision = recipe.model.from_pretrained, recipe.model.revision
    if name is None:
        yield Finding((TRUST,), f"{TRUST} needs model.from_pretrained, whose code is meant: give one of them up")
    elif not exists(name) and (revision is None or not COMMIT.fullmatch(revision)):
        yield Finding(
            (TRUST, "model.revision"),
            f"{TRUST} runs code of {name}, so model.revision must pin it to a commit of 40 hex digits, not "
            f"{shown(revision)}; a branch or a tag can be moved",
        )


def read_auto(recipe: Recipe) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The network in Hugging Face's names, None while it is still on the hub, and what is wrong with it."""
    model = recipe.model
    if model.from_pretrained is None:
        findings = list(_from_scratch_findings(model.config))
        config: dict[str, Any] = model.config
    else:
        findings = list(_override_findings(model.config))
        if not exists(model.from_pretrained):
            return None, findings
        try:
            config = read_config(Path(model.from_pretrained))
        except (RecipeError, DataError) as error:
            return None, [Finding(("model.from_pretrained",), f"model.from_pretrained: {line}") for line in error.lines]
        findings += folder_findings(recipe, config)
    findings += layer_findings({**config, **model.config})
    vocab_size, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    findings += size_findings(recipe, vocab_size, positions, tokenizer_vocab_size(recipe.data))
    return (None if findings else {**config, **model.config}), findings


def folder_findings(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with the config.json of model.from_pretrained; asked again for one that came from the hub."""
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
    """Where data ask for more than the network has; a size that is not a number here is not known here. The weights of a folder
    get rows for new tokens."""
    keys = ("model.config", "model.from_pretrained")
    fixed = recipe.model.from_pretrained is not None
    missing = tokenizer_size - vocab_size if isinstance(vocab_size, int) and tokenizer_size is not None else 0
    if missing > (len(recipe.data.new_tokens) if fixed else 0):
        remedy = "give the tokenizer that came with the weights" if fixed else f"legal: {tokenizer_size} or more"
        yield Finding(
            ("model.config.vocab_size", *keys, "data.tokenizer"),
            f"the model's vocab_size = {vocab_size} is less than the tokenizer's {tokenizer_size} symbols; {remedy}",
        )
    if isinstance(max_positions, int) and 0 < max_positions < recipe.data.seq_len:  # XLNet: -1, no limit
        yield Finding(
            ("model.config.max_position_embeddings", "data.seq_len", *keys),
            f"the model's max_position_embeddings = {max_positions} is less than data.seq_len = {recipe.data.seq_len}; "
            f"legal: data.seq_len of at most {max_positions}",
        )


def layer_findings(config: Mapping[str, Any], below: str = "") -> Iterator[Finding]:
    """Where a model would be built block by block for days; `below`: of which part of a config, such as "text_config."."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from layer_findings(value, f"{below}{key}.")
        elif isinstance(key, str) and LAYERS.search(key) and isinstance(value, int) and value > MOST_LAYERS:
            yield Finding(
                (f"model.config.{key}", "model.config", "model.from_pretrained"),
                f"the model's {below}{printable(key)} = {value}: legal are up to {MOST_LAYERS}",
            )


def _from_scratch_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    if not isinstance(config.get("model_type"), str):
        yield Finding(
            ("model.config.model_type", "model.config", "model.family"),
            'model.family = "auto" needs model.from_pretrained, or model.config with model_type, as in {"model_type": "bloom"}',
        )
    for key in ("dtype", "torch_dtype"):
        if key in config:
            message = f"model.config.{key}: number formats have one owner: write precision.dtype"
            yield Finding((f"model.config.{key}",), message)


def _override_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key in config:
        if not any(word in key for word in DROPOUT):
            yield Finding(
                (f"model.config.{printable(key)}", "model.from_pretrained"),
                f"model.config.{printable(key)} is fixed by the weights of model.from_pretrained; legal here: rates of dropout",
            )
