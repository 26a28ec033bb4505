"""What a run trains: a network of one of our families, or any model of transformers (family "auto")."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from parallel.tensor import TensorParallel
from trainer.model import families
from trainer.model.auto_network import AutoNetwork
from trainer.model.auto_stage import AutoStage
from trainer.model.families import TransformerConfig
from trainer.model.transformer import Stage, blocks_of

Network = TransformerConfig | AutoNetwork


def make_stage(
    network: Network,
    *,
    dtype: torch.dtype,
    recompute: Literal["none", "selective", "full"],
    tp: TensorParallel,
    device: torch.device,
    fill: Callable[[nn.Module], None],
    partition: Callable[[nn.Module], None],
) -> Stage | AutoStage:
    """This rank's part of the network; see `Stage` for the arguments."""
    if isinstance(network, AutoNetwork):
        return AutoStage(network, dtype=dtype, recompute=recompute, device=device, fill=fill, partition=partition)
    blocks = blocks_of(network)
    return Stage(network, blocks, dtype=dtype, recompute=recompute, tp=tp, device=device, fill=fill, partition=partition)


def largest_weight(network: Network) -> int:
    """Elements of the largest single weight."""
    return network.largest_weight if isinstance(network, AutoNetwork) else families.largest_weight(network)


def save_code(network: Network, folder: Path) -> None:
    """Put Python files that are part of the model beside its exported weights."""
    if isinstance(network, AutoNetwork):
        network.save_code(folder)


def config_json(network: Network, *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json with which transformers loads exported weights. `dtype`: "float32", "bfloat16" or "float16"."""
    if isinstance(network, AutoNetwork):
        return network.config_json(dtype)
    return families.to_hf_config(network, dtype=dtype, eos_token_id=eos_token_id)
