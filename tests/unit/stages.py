"""Whole networks of ours on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from parallel.tensor import TensorParallel
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import PretrainedWeights, read_config
from trainer.model.transformer import Stage
from trainer.schema import Tuning
from trainer.tuning.adapt import adaptation


def stage_from(
    folder: Path, *, recompute: Literal["none", "selective", "full"] = "none", dtype: torch.dtype = torch.float32
) -> Stage:
    """Our whole model with the weights of a Hugging Face folder."""
    hf_config = read_config(folder)
    config = from_hf(hf_config["model_type"], hf_config)
    return Stage(
        config,
        blocks_of(config),
        dtype=dtype,
        recompute=recompute,
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=PretrainedWeights(folder).fill,
    )


def whole_model(network: TransformerConfig, tuning: Tuning, device: str, fill: Callable[[nn.Module], None]) -> Stage:
    return Stage(
        network,
        blocks_of(network),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device(device),
        adapt=adaptation(tuning, network),
        fill=fill,
    )
