"""What a run trains: a network of one of our families, or any model of transformers (family "auto")."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.model import config, translation
from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
Network = TransformerConfig | AutoNetwork


def largest_weight(network: Network) -> int:
    """Elements of the largest single weight."""
    return network.largest_weight if isinstance(network, AutoNetwork) else config.largest_weight(network)


def save_code(network: Network, folder: Path) -> None:
    """Put Python files that are part of the model beside its exported weights."""
    if isinstance(network, AutoNetwork):
        network.save_code(folder)


class Saves(Protocol):
    """A tokenizer, as far as it matters here."""

    @property
    def end_of_document(self) -> int: ...

    @property
    def start_of_target(self) -> int: ...

    @property
    def padding(self) -> int | None: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class ModelFiles:
    """What a Hugging Face folder has beside the weights. `dtype`: of the weights, "float32", "bfloat16" or "float16".

    `end_of_turn`: the token that ends an assistant's turn, where conversations are learned.
    """

    network: Network
    tokenizer: Saves
    dtype: str
    end_of_turn: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return config_json(
            self.network,
            dtype=self.dtype,
            eos_token_id=self.tokenizer.end_of_document,
            pad_token_id=self.tokenizer.padding,
            start_of_target=self.tokenizer.start_of_target,
        )

    def save_others(self, folder: Path) -> None:
        """The tokenizer, where generation ends, and Python files that are part of the model."""
        self.tokenizer.save(folder)
        end = self.tokenizer.end_of_document
        if self.end_of_turn not in (None, end):  # which config.json does not name
            ends = {"eos_token_id": [self.end_of_turn, end]}
            (folder / GENERATION_CONFIG).write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
        save_code(self.network, folder)

    def save(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        self.save_others(folder)


def config_json(
    network: Network,
    *,
    dtype: str,
    eos_token_id: int | None,
    pad_token_id: int | None = None,
    start_of_target: int | None = None,
) -> dict[str, Any]:
    """The config.json with which transformers loads exported weights. `dtype`: "float32", "bfloat16" or "float16".
    `start_of_target`: what comes before a translation."""
    if isinstance(network, AutoNetwork):
        return network.config_json(dtype)
    return translation.to_hf_config(
        network, dtype=dtype, eos_token_id=eos_token_id, pad_token_id=pad_token_id, start_of_target=start_of_target
    )
