"""The files of a Hugging Face folder beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import to_hf
from trainer.model.network import Network
from trainer.model.origin import GENERATION_CONFIG, Origin, as_list
from trainer.tasks import TASKS, TaskName

CONFIG = "config.json"
# transformers' own key of config.json for a model's last training: our data.task
TASK = "finetuning_task"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a Hugging Face folder beside the weights. `dtype`: of the weights, "float32",
    "bfloat16" or "float16".

    `task`: data.task. `end_of_turn`: the token that ends an assistant's turn, where conversations
    are learned. `origin`: of the pretrained folder that the run started from.
    """

    network: Network
    tokenizer: Tokenizer
    dtype: str
    task: TaskName = "pretrain"
    end_of_turn: int | None = None
    origin: Origin | None = None

    @property
    def config(self) -> dict[str, Any]:
        problem = TASKS[self.task].problem_type
        return {
            **config_json(self.network, self.tokenizer, dtype=self.dtype, origin=self.origin),
            **({"problem_type": problem} if problem else {}),
            TASK: self.task,
        }

    @property
    def generation(self) -> dict[str, Any] | None:
        """The contents of generation_config.json; None where config.json says everything.

        They are those of the folder that the run started from. Where turns were learned, the token
        that ends a turn also ends generation.
        """
        if not self.network.writes:
            return None
        said = dict(self.origin.generation) if self.origin else {}
        ends = as_list(said.get("eos_token_id"))
        for token in (self.end_of_turn, self.tokenizer.end_of_document):
            if token is not None and token not in ends:
                ends.append(token)
        if not said and ends == as_list(self.config.get("eos_token_id")):
            return None
        return {**said, "eos_token_id": ends if ends[1:] else ends[0]}

    def save_others(self, folder: Path) -> None:
        """Write the tokenizer, the settings of generation, and Python files that are part of the
        model."""
        self.tokenizer.save(folder)
        if (generation := self.generation) is not None:
            (folder / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        self.network.save_code(folder)

    def save(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        self.save_others(folder)


@singledispatch
def config_json(network: Network, tokenizer: Tokenizer, *, dtype: str, origin: Origin | None) -> dict[str, Any]:
    """Return the config.json with which transformers loads exported weights. `dtype`: "float32",
    "bfloat16" or "float16".

    Special tokens are those of the folder that the run started from, or else the tokenizer's.
    """
    raise TypeError(type(network))


@config_json.register
def _(network: AutoNetwork, tokenizer: Tokenizer, *, dtype: str, origin: Origin | None) -> dict[str, Any]:
    written, ids = network.config_json(dtype), dict(origin.ids) if origin else {}
    if origin is not None and not ids:  # the recipe has another tokenizer
        end = tokenizer.end_of_document
        begin = end if tokenizer.bos is None else tokenizer.bos
        ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.padding}
    return {**written, **{name: token for name, token in ids.items() if name in written}}


@config_json.register
def _(network: TransformerConfig, tokenizer: Tokenizer, *, dtype: str, origin: Origin | None) -> dict[str, Any]:
    start, ids = tokenizer.start_of_target, dict(origin.ids) if origin else {}
    written = to_hf(
        network,
        dtype=dtype,
        eos_token_id=tokenizer.end_of_document,
        bos_token_id=tokenizer.bos,
        pad_token_id=tokenizer.padding,
        start_of_target=start,
    )
    if network.encoder_layers:  # each target was trained to follow this token
        ids |= {"decoder_start_token_id": start}
    return {**written, **ids}
