"""Checks of recipes of family "auto", whose model transformers builds, without importing
transformers.

Some things only transformers knows: whether it has the model type, and the keys of its config
class. They are checked when training starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError
from trainer.model.auto_rules import AUTO, TRUST, folder_findings, layer_findings, size_findings
from trainer.model.config_file import read_config
from trainer.model.families import FAMILIES
from trainer.recipe.names import exists, tokenizer_vocab_size
from trainer.redaction import printable, shown
from trainer.schema import Finding, Recipe
from trainer.tasks import TASKS

AXES = ("tensor", "pipeline")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Words in Hugging Face's names of rates of dropout. Of all keys, only these rates change neither
# shapes nor what the loaded weights compute.
DROPOUT = ("dropout", "pdrop")


def auto_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding for each key that cannot be used together with family "auto"."""
    model = recipe.model
    if model.family != AUTO:
        return
    for axis in AXES:
        if (degree := getattr(recipe.parallel, axis)) > 1:
            yield Finding(
                (f"parallel.{axis}", "model.family"),
                f'parallel.{axis} = {degree}: a model of family "auto" is transformers\' own and only data parallelism and '
                f"ZeRO divide it; legal: 1, or a family whose layers divide: {', '.join(FAMILIES)}",
            )
    if recipe.train.recompute == "selective":
        yield Finding(
            ("train.recompute", "model.family"),
            'train.recompute = "selective" needs our own attention, which family "auto" has not; legal: "none", "full"',
        )
    if recipe.train.label_smoothing:
        yield Finding(
            ("train.label_smoothing", "model.family"),
            'train.label_smoothing is used by the families that are our own, not by model.family "auto": remove it',
        )
    if recipe.tuning.method is not None:
        yield Finding(
            ("tuning.method", "model.family"),
            f'tuning.method = "{recipe.tuning.method}" adapts our own layers, which family "auto" does not have: remove '
            "it, or take one of the families that are built here",
        )
    task = TASKS[recipe.data.task]
    if not task.auto_class:
        legal = ", ".join(f.name for f in FAMILIES.values() if task.suits(causal=f.causal, translates=f.translates))
        yield Finding(
            ("model.family", "data.task"),
            f'data.task "{recipe.data.task}" needs {task.built_here}, which family "auto" does not have: name a family that '
            f"is built here, one of {legal}",
        )
    if model.trust_remote_code:
        yield from _trust_findings(recipe)


def _trust_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding if remote code is trusted that may change under the run, or has no source."""
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
    """Return the network in Hugging Face's names, and what is wrong with it.

    The network is None if it is still on the hub, or if there are findings.
    """
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
