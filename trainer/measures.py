"""What an evaluation adds up over micro-batches and ranks, and what the sums say. No torch: every rank knows them, also one
that holds no head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EvalResult:
    """`sums`: a task's statistics, over all micro-batches of all ranks; the first is the loss."""

    sums: tuple[float, ...]
    num_targets: int

    @property
    def loss(self) -> float:
        return self.sums[0] / self.num_targets


class Measures(Protocol):
    """How the statistics of a task are read. They are additive: what the last block returns for a micro-batch when it is asked
    for them, float64 [num_sums], index 0 the loss summed over targets."""

    num_sums: int

    def record(self, result: EvalResult) -> dict[str, float]:
        """What trackers are told, by names beginning with eval_."""


@dataclass(frozen=True)
class TokenMeasures:
    """Of predicted tokens: loss, and how many had the highest logit."""

    num_sums: int = 2

    def record(self, result: EvalResult) -> dict[str, float]:
        return {
            "eval_loss": result.loss,
            "eval_perplexity": math.exp(min(result.loss, 700.0)),  # beyond, a float overflows
            "eval_accuracy": result.sums[1] / result.num_targets,
            "eval_targets": result.num_targets,
        }


def measures_of(task: str) -> Measures:
    """Those of a recipe's data.task."""
    return MEASURES[task]


MEASURES: dict[str, Measures] = dict.fromkeys(("pretrain", "sft", "translate"), TokenMeasures())
