"""The description of a model of family "auto". No torch, so that model FLOPs are arithmetic here
too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AutoNetwork:
    """A model that transformers builds: family "auto"'s counterpart of `TransformerConfig`.

    | field | meaning |
    |---|---|
    | `hf_config` | transformers' config object |
    | `build` | makes the model in fp32: with its first weights, or on the meta device for a `fill` to give them |
    | `matmul_weights` | elements that a token is multiplied with |
    | `attention_width` | Σ over layers of heads · head size; 0 where the config does not tell |
    | `largest_weight` | elements of the largest single weight |
    | `code` | folder whose Python files are part of the model |
    """

    hf_config: Any
    architecture: str
    build: Callable[[], Any]
    vocab_size: int
    matmul_weights: int
    attention_width: int
    largest_weight: int
    code: Path | None
    causal: bool = True  # checked by `AutoStage.require_causal`
    writes: bool = True
    max_positions: int | None = None  # not known here

    def config_json(self, dtype: str) -> dict[str, Any]:
        """Return the config.json of an exported folder with weights in `dtype` ("float32",
        "bfloat16" or "float16")."""
        written: dict[str, Any] = json.loads(self.hf_config.to_json_string(use_diff=False))
        written.pop("_name_or_path", None)  # its path on this machine
        return {**written, "architectures": [self.architecture], "dtype": dtype}

    def save_code(self, folder: Path) -> None:
        """Copy the model's own Python files, if it has any, into the folder of its weights."""
        for path in self.code.glob("*.py") if self.code else ():
            shutil.copyfile(path, folder / path.name)
