"""What a run trains: a network of one of our families, or any model of transformers (family "auto")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.model import config, translation
from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig

Network = TransformerConfig | AutoNetwork


def largest_weight(network: Network) -> int:
    """Elements of the largest single weight."""
    return network.largest_weight if isinstance(network, AutoNetwork) else config.largest_weight(network)


def save_code(network: Network, folder: Path) -> None:
    """Put Python files that are part of the model beside its exported weights."""
    if isinstance(network, AutoNetwork):
        network.save_code(folder)


def config_json(network: Network, *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json with which transformers loads exported weights. `dtype`: "float32", "bfloat16" or "float16"."""
    if isinstance(network, AutoNetwork):
        return network.config_json(dtype)
    return translation.to_hf_config(network, dtype=dtype, eos_token_id=eos_token_id)
