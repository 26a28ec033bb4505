"""The units that a model is built from and divided into. No torch, so that `check` can show the
blocks of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.model.config import TransformerConfig


@dataclass(frozen=True)
class Block:
    """A unit of the model, which is on one stage."""

    kind: Literal["embedding", "layer", "head"]
    layer: int = 0


def blocks_of(config: TransformerConfig) -> list[Block]:
    return [Block("embedding"), *(Block("layer", i) for i in range(config.num_layers)), Block("head")]
