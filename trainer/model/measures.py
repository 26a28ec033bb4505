"""What an evaluation adds up over micro-batches and ranks, and what the sums say. No torch: every rank knows them, also one
that holds no head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainer.model.config import PAIRED_CLASSES, TransformerConfig
from trainer.tasks import TaskName

if TYPE_CHECKING:
    from trainer.data.loader import MicroBatch
    from trainer.model.network import Network


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

    @property
    def num_sums(self) -> int: ...

    @property
    def num_step_sums(self) -> int:
        """What the last block returns in training: the loss, and after it statistics that cost nothing more."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether a unigram model can be compared with it."""

    def num_targets(self, batch: MicroBatch) -> int:
        """What the sums of a micro-batch are divided by."""

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        """What trackers are told of a step beside its loss; `means` without that."""

    def record(self, result: EvalResult) -> dict[str, float]:
        """What trackers are told, by names beginning with eval_."""


@dataclass(frozen=True)
class TokenMeasures:
    """Of predicted tokens: loss, how many had the highest logit, and in how many documents all of them had. `of_answers`: a
    document is an answer, of which it is worth knowing that the likeliest tokens would write it."""

    of_answers: bool = False
    num_sums: int = 4
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
            **({"eval_exact_match": result.sums[2] / result.sums[3]} if self.of_answers else {}),
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
        return sum(len(row) // 2 for row in batch.documents.lengths)  # of an odd number the last one fills the row

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        chosen, rejected, accuracy = means
        rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracy}
        return {f"rewards/{name}": value for name, value in rewards.items()}

    def record(self, result: EvalResult) -> dict[str, float]:
        loss, *means = (total / result.num_targets for total in result.sums)
        rewards = {f"eval_{name}": value for name, value in self.step_record(means).items()}
        return {"eval_loss": loss, **rewards, "eval_targets": result.num_targets}


@dataclass(frozen=True)
class ClassMeasures:
    """Of texts sorted into classes: loss, and how many of class i were taken for class j, or, of more than PAIRED_CLASSES, how
    many of each were right, there and named."""

    num_classes: int
    num_step_sums: int = 1
    predicts_tokens: bool = False

    @property
    def num_sums(self) -> int:
        return 1 + (self.num_classes**2 if self._paired else 3 * self.num_classes)

    @property
    def _paired(self) -> bool:
        return self.num_classes <= PAIRED_CLASSES

    def num_targets(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        return {}

    def record(self, result: EvalResult) -> dict[str, float]:
        """`eval_majority`: the accuracy of always naming the commonest class. `eval_f1` is the mean over the classes that occur
        or were named (macro); of two classes also that of the second alone, as in GLUE (Wang et al. 2018, arXiv:1804.07461)."""
        right, there, named = self._by_class(result)
        scores = [_f1(*counts) for counts in zip(right, there, named, strict=True)]
        occurring = [score for score in scores if score is not None]
        return {
            "eval_loss": result.loss,
            "eval_accuracy": sum(right) / result.num_targets,
            "eval_majority": max(there) / result.num_targets,
            "eval_f1": sum(occurring) / len(occurring),
            **({"eval_f1_positive": scores[1] or 0.0} if self.num_classes == 2 else {}),
            "eval_targets": result.num_targets,
        }

    def _by_class(self, result: EvalResult) -> tuple[list[int], list[int], list[int]]:
        """How often each class was right, there and named."""
        if pairs := self.confusion(result):
            return (
                [row[number] for number, row in enumerate(pairs)],
                list(map(sum, pairs)),
                list(map(sum, zip(*pairs, strict=True))),
            )
        counts, C = [round(count) for count in result.sums[1:]], self.num_classes
        return counts[:C], counts[C : 2 * C], counts[2 * C :]

    def confusion(self, result: EvalResult) -> list[list[int]]:
        """Row: the true class; column: the class that was named. [] of more than PAIRED_CLASSES."""
        if not self._paired:
            return []
        counts, C = [round(count) for count in result.sums[1:]], self.num_classes
        return [counts[row * C : (row + 1) * C] for row in range(C)]


def _f1(right: int, there: int, named: int) -> float | None:
    """2 · hits / (how many there are + how many were named); None where there is neither."""
    return 2 * right / (there + named) if there + named else None


def measures_of(task: TaskName, network: Network) -> Measures:
    """Return what an evaluation of a recipe's data.task measures."""
    return MEASURES[task](network)


def _of_classes(network: Network) -> Measures:
    assert isinstance(network, TransformerConfig)
    return ClassMeasures(len(network.classes))


MEASURES: Mapping[TaskName, Callable[[Network], Measures]] = {
    **dict.fromkeys(("pretrain", "mlm"), lambda _: TokenMeasures()),
    **dict.fromkeys(("sft", "translate"), lambda _: TokenMeasures(of_answers=True)),
    "preference": lambda _: PairMeasures(),
    "classify": _of_classes,
}
