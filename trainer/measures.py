"""What an evaluation adds up over micro-batches and ranks, and what the sums say. No torch: every rank knows them, also one
that holds no head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.data.loader import MicroBatch


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
    num_step_sums: int  # what the last block returns in training: the loss, and after it statistics that cost nothing more
    predicts_tokens: bool  # whether a unigram model can be compared with it

    def num_targets(self, batch: MicroBatch) -> int:
        """What the sums of a micro-batch are divided by."""

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        """What trackers are told of a step beside its loss; `means` without that."""

    def record(self, result: EvalResult) -> dict[str, float]:
        """What trackers are told, by names beginning with eval_."""


@dataclass(frozen=True)
class TokenMeasures:
    """Of predicted tokens: loss, and how many had the highest logit."""

    num_sums: int = 2
    num_step_sums: int = 1
    predicts_tokens: bool = True

    def num_targets(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        return {}

    def record(self, result: EvalResult) -> dict[str, float]:
        return {
            "eval_loss": result.loss,
            "eval_perplexity": math.exp(min(result.loss, 700.0)),  # beyond, a float overflows
            "eval_accuracy": result.sums[1] / result.num_targets,
            "eval_targets": result.num_targets,
        }


@dataclass(frozen=True)
class PairMeasures:
    """Of preferences: loss, what the model as a reward model gives the chosen and the rejected answer, and how many pairs it
    has in order. The names are those of Hugging Face's trl. Its targets are pairs."""

    num_sums: int = 4
    num_step_sums: int = 4
    predicts_tokens: bool = False

    def num_targets(self, batch: MicroBatch) -> int:
        return sum(len(row) // 2 for row in batch.documents)  # of an odd number the last one fills the row

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        chosen, rejected, accuracy = means
        rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracy}
        return {f"rewards/{name}": value for name, value in rewards.items()}

    def record(self, result: EvalResult) -> dict[str, float]:
        loss, *means = (total / result.num_targets for total in result.sums)
        rewards = {f"eval_{name}": value for name, value in self.step_record(means).items()}
        return {"eval_loss": loss, **rewards, "eval_targets": result.num_targets}


def measures_of(task: str) -> Measures:
    """Those of a recipe's data.task."""
    return MEASURES[task]


MEASURES: dict[str, Measures] = {
    **dict.fromkeys(("pretrain", "sft", "translate"), TokenMeasures()),
    "preference": PairMeasures(),
}
