"""The facts that must be the same for a run to go on from a checkpoint, and those that may be
allowed to differ. No torch.

Facts are JSON values by dotted key. Those of the recipe are known before anything is loaded, so a
run that must not go on is refused within a second. The fingerprints of tokenizer and data follow
when those are open.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from trainer.schema import Recipe, Tuning

# For each `--allow-change WORD`: the fact that may differ, and the consequence.
DATA = "data"
CHANGES = {
    "precision": ("precision.dtype", "the fp32 master weights go on in the new format"),
    "optimizer": ("optimizer.name", "states that both have go on, the others start at 0"),
    "tokenizer": ("data.tokenizer", "the same tokens may mean other text"),
    DATA: ("data.samples", "the run goes on at the same place of another order"),
}
# The keys of config.json that tell who wrote it, or which symbols its tokenizer uses as marks,
# rather than what the model is.
NOT_OF_THE_MODEL = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "finetuning_task",
    "use_cache",
)
TUNING_FACTS = ("targets", "rank", "alpha", "rank_stabilized", "bottleneck", "quantize")
MODEL = "model.config."


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    return {
        "data.task": recipe.data.task,
        "data.new_tokens": list(recipe.data.new_tokens),
        "batch.global_sequences": recipe.batch.global_sequences,
        "precision.dtype": recipe.precision.dtype,
        "optimizer.name": recipe.optimizer.name,
        **_tuning_facts(recipe.tuning),
    }


def _tuning_facts(tuning: Tuning) -> dict[str, Any]:
    """Return the facts that decide which tensors there are and what they do; dropout may change."""
    keys = ("method", *TUNING_FACTS) if tuning.method else ("method",)
    return {f"tuning.{key}": getattr(tuning, key) for key in keys}


def model_facts(config_json: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{MODEL}{key}": value for key, value in config_json.items() if key not in NOT_OF_THE_MODEL}


def data_facts(*, tokenizer: str, samples: str) -> dict[str, Any]:
    """Return the fingerprints of the tokenizer, and of every training sample in its order."""
    return {"data.tokenizer": tokenizer, "data.samples": samples}


def refusals(where: str, step: int, saved: Mapping[str, Any], given: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Return one line for each fact of `given` that differs from the saved one. `allowed`: words of
    CHANGES."""
    lines = []
    for key, value in given.items():
        if key not in saved or saved[key] == value:
            continue
        word = next((word for word, (fact, _) in CHANGES.items() if fact == key), None)
        if word in allowed:
            continue
        differs = f"{key}: {where} was saved with {json.dumps(saved[key])}, this run has {json.dumps(value)}"
        if word is not None:
            lines.append(f"{differs}: set it back, or allow it with --allow-change {word} ({CHANGES[word][1]})")
        elif key == "batch.global_sequences":
            consumed = step * saved[key]
            lines.append(
                f"{differs}: it has consumed {step} steps × {saved[key]} = {consumed} sequences, and step × {value} would "
                f"begin at others ({consumed} / {value} = {consumed / value:g}): set it back"
            )
        else:
            lines.append(f"{differs}: it is another model: set it back, or export the checkpoint and start from it")
    if given.keys() >= {"data.samples"}:
        lines += [
            f"{key}: {where} was saved with {json.dumps(value)}, this run's model has no such key: set it back"
            for key, value in saved.items()
            if key.startswith(MODEL) and key not in given
        ]
    return lines
