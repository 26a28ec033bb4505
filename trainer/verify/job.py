"""The messages between the command and its ranks: JSON and safetensors in a folder of one layout.
No torch.

| file | from | what |
|---|---|---|
| `recipe.json` | command | the recipe in this layout |
| `job.json` | command | `Job` |
| `rank-N.json` | every rank | `RankResult` |
| `update.safetensors`, `gradient.safetensors` | rank 0 | every logical tensor's, by name |
| `failure-N.json` | a rank that failed | `Failure` |
| `rank-N.log` | every rank | the output of the rank and its libraries |
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

UPDATE, GRADIENT = "update.safetensors", "gradient.safetensors"


@dataclass(frozen=True)
class _File:
    """A dataclass of JSON values that is kept in a file."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Job(_File):
    """The work on one layout. `degrees`: those of the axes. `steps`: with the recipe's own
    optimizer."""

    degrees: dict[str, int]
    port: int
    steps: int


@dataclass(frozen=True)
class RankResult(_File):
    """The results of one rank. Lists are over steps: the SGD step, then those of the recipe's own
    optimizer; in fp32 and again in float64.

    `boxes`: digest of every box of a logical tensor that the rank holds, after the last step.
    `initial`: digest of every logical tensor at the start, in the model's order; rank 0 only.
    """

    losses: list[float]
    norms: list[float]
    targets: list[int]
    losses64: list[float]
    norms64: list[float]
    boxes: dict[str, str]
    initial: dict[str, str]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The numbers that must be the same on all ranks."""
        return (self.losses, self.norms, self.targets, self.losses64, self.norms64)


@dataclass(frozen=True)
class Failure(_File):
    """The reason why a rank stopped, and the time [s since the epoch]: the first failure is the
    cause of the others."""

    time: float
    exit_code: int
    reason: str
