"""The facts that a tracker may want to know before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts of a run.

    `recipe` is the resolved recipe, nested as in the file. `total_steps` is the step at which the
    run ends, `start_step` the steps done before this start (0, or those of the checkpoint).
    `devices` says what it runs on, such as "8 × H100".
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    total_steps: int
    world_size: int
    devices: str
    start_step: int = 0
