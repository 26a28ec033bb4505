"""The network that a recipe describes, in Hugging Face's names, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError
from trainer.model import config_file
from trainer.model.auto_rules import AUTO
from trainer.model.config import TransformerConfig
from trainer.model.families import FAMILIES
from trainer.model.hf_config import read_config
from trainer.model.new_tokens import grown, growth_findings
from trainer.recipe.auto import read_auto
from trainer.recipe.names import exists, tokenizer_vocab_size
from trainer.recipe.pipeline import layer_findings
from trainer.recipe.tensor import tensor_findings
from trainer.redaction import printable, shown
from trainer.schema import Finding, Recipe
from trainer.tasks import TASKS
from trainer.tuning.targets import quantization_findings, target_findings


def read_network(recipe: Recipe) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the network in Hugging Face's names, and what is wrong with it.

    The network is None while it is still on the hub, or if it cannot be read.
    """
    model = recipe.model
    if model.family == AUTO:
        return read_auto(recipe)
    if model.from_pretrained is None:
        return _from_config(recipe)
    findings: list[Finding] = []
    config, family = _pretrained_config(model.from_pretrained, findings)
    if family is not None and model.family not in (None, family):
        message = f"model.family = {json.dumps(model.family)}, but model.from_pretrained holds a {family}: remove model.family"
        findings.append(Finding(("model.family", "model.from_pretrained"), message))
    for candidate in FAMILIES.values():
        if candidate.name == (family or model.family):
            findings.extend(_override_findings(model.config, candidate.overridable))
    if config is None or findings:
        return None, findings
    merged = {**config, **model.config}
    vocab_size, num_new = tokenizer_vocab_size(recipe.data), len(recipe.data.new_tokens)
    network, wrong = network_from(str(family), merged, vocab_size, num_new=num_new, fixed=True)
    place = Path(model.from_pretrained) / "config.json"
    findings += [Finding(("model.from_pretrained", *_config_keys(f)), f"{place}: {f.message}") for f in wrong]
    findings += fit_findings(recipe, with_head(recipe, network)) if network else []
    return merged, findings


def _from_config(recipe: Recipe) -> tuple[dict[str, Any] | None, list[Finding]]:
    model = recipe.model
    if model.family is None:
        legal = f"model.family ({', '.join([*FAMILIES, AUTO])}) with model.config, or model.from_pretrained"
        return None, [Finding(("model.family", "model.from_pretrained", "model"), f"no model: give {legal}")]
    findings = [
        Finding((f"model.config.{key}",), f"model.config.{key}: number formats have one owner: write precision.dtype")
        for key in ("dtype", "torch_dtype")
        if key in model.config
    ]
    network, wrong = network_from(model.family, model.config, tokenizer_vocab_size(recipe.data))
    for finding in wrong:
        known = model.family in FAMILIES
        message = f"model.config: {finding.message}" if known else f'model.family: {finding.message}, or "{AUTO}"'
        findings.append(Finding((*_config_keys(finding), "model.family"), message))
    findings += fit_findings(recipe, with_head(recipe, network)) if network else []
    return dict(model.config), findings


def network_from(
    family: str, hf_config: Mapping[str, Any], vocab_size: int | None, *, num_new: int = 0, fixed: bool = False
) -> tuple[TransformerConfig | None, list[Finding]]:
    """Return the network, and what is wrong with the config.

    If the config gives no number of symbols, the tokenizer's `vocab_size` is taken. `fixed`: the
    config is that of a folder's weights, which grow by no more than the `num_new` new tokens at the
    end of the tokenizer.
    """
    if vocab_size is not None:
        hf_config = {"vocab_size": vocab_size, **hf_config}
        hf_config = grown(hf_config, vocab_size, num_new) if fixed else hf_config
    config, findings = read_config(family, hf_config)
    if config is not None and vocab_size is not None and config.vocab_size < vocab_size:
        remedy = "give the tokenizer that came with the weights" if fixed else f"legal: {vocab_size} or more"
        message = f"vocab_size = {config.vocab_size} is less than the tokenizer's {vocab_size} symbols; {remedy}"
        findings.append(Finding(("vocab_size",), message))
    return config, findings


def with_head(recipe: Recipe, network: TransformerConfig, classes: Sequence[str] = ()) -> TransformerConfig:
    """Return the network with the head of the recipe's task."""
    task = TASKS[recipe.data.task]
    named = (*classes,) or (*recipe.data.classes,) or task.outputs
    return replace(network, classes=named if task.outputs else ())


def _config_keys(finding: Finding) -> tuple[str, ...]:
    return tuple(f"model.config.{printable(key)}" for key in finding.keys)


def fit_findings(recipe: Recipe, network: TransformerConfig) -> Iterator[Finding]:
    """Yield a finding for each thing that the rest of the recipe needs and this network lacks."""
    yield from _task_findings(recipe, network)
    yield from growth_findings(recipe, network)
    yield from _position_findings(recipe, network)
    yield from tensor_findings(recipe, network)
    yield from layer_findings(recipe, network)
    yield from target_findings(recipe.tuning, network)
    yield from quantization_findings(recipe, network)


def _task_findings(recipe: Recipe, network: TransformerConfig) -> Iterator[Finding]:
    name, keys = recipe.data.task, ("model.family", "model.from_pretrained", "data.task")
    task, translates = TASKS[name], bool(network.encoder_layers)
    if translates and recipe.tuning.method is not None:
        yield Finding(
            ("tuning.method", *keys),
            f"tuning.method = {json.dumps(recipe.tuning.method)}: family {network.family} is trained whole here; remove it",
        )
    if task.suits(causal=network.causal, translates=translates):
        return
    if translates or task.translates:
        reads = "reads one text and writes another" if translates else "has no encoder"
        why = f"{reads}, and data.task is {name}"
    elif network.causal:
        why = f"sees only what stands before a token, and data.task {name} has it guessed from both sides"
    else:
        others = " and ".join(other for other, facts in TASKS.items() if facts.suits(causal=False, translates=False))
        why = f"sees the next token, which data.task {name} predicts: it is for data.task {others}"
    legal = ", ".join(f.name for f in FAMILIES.values() if task.suits(causal=f.causal, translates=f.translates))
    yield Finding(keys, f"model.family = {json.dumps(network.family)} {why}; legal families for {name}: {legal}")


def _position_findings(recipe: Recipe, network: TransformerConfig) -> Iterator[Finding]:
    if network.max_positions >= recipe.data.seq_len:
        return
    name = next(name for name, rule in FAMILIES[network.family].keys.items() if "max_positions" in rule.fields)
    yield Finding(
        (f"model.config.{name}", "data.seq_len", "model.from_pretrained"),
        f"model.config.{name} = {network.max_positions} is less than data.seq_len = {recipe.data.seq_len}; legal: "
        f"model.config.{name} of at least {recipe.data.seq_len}, or data.seq_len of at most {network.max_positions}",
    )


def _override_findings(config: Mapping[str, Any], overridable: Collection[str]) -> Iterator[Finding]:
    for key in config:
        if key not in overridable:
            legal = ", ".join(sorted(overridable))
            yield Finding(
                (f"model.config.{printable(key)}", "model.from_pretrained"),
                f"model.config.{printable(key)} is fixed by the weights of model.from_pretrained; legal here: {legal}",
            )


def _pretrained_config(name: str, findings: list[Finding]) -> tuple[dict[str, Any] | None, str | None]:
    """Return config.json of a folder and its family; (None, None) for a hub name."""
    if not exists(name):
        return None, None
    folder = Path(name)
    keys = ("model.from_pretrained",)
    try:
        config = config_file.read_config(folder)
    except (RecipeError, DataError) as error:
        findings.extend(Finding(keys, f"model.from_pretrained: {line}") for line in error.lines)
        return None, None
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        message = f"{folder / 'config.json'}: model_type = {shown(family)} is not a supported family; legal: "
        by_transformers = f', or model.family "{AUTO}" for any other model of transformers (data parallelism only)'
        findings.append(Finding(keys, message + ", ".join(FAMILIES) + by_transformers))
        return None, None
    return config, family
