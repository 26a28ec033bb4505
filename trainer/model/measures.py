"""The statistics that an evaluation sums over micro-batches and ranks, and the figures computed
from the sums. No torch. Every rank has them, also one without a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from trainer.model.config import PAIRED_CLASSES, TransformerConfig
from trainer.tasks import TaskName

if TYPE_CHECKING:
    from trainer.data.loader import MicroBatch
    from trainer.model.network import Network

EVAL = "eval_"  # begins the name of each figure of an evaluation
LOSS = "eval_loss"  # every task has it
Better = Literal["lower", "higher"]
# The figures of translations that are written at an evaluation, which takes long: only if a recipe
# compares by one of them.
OF_TRANSLATIONS: Mapping[str, Better] = {"eval_bleu": "higher", "eval_chrf": "higher"}


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    `sums`: a task's statistics, over all micro-batches of all ranks; the first is the loss.
    `tokens_per_byte`: of the held-out texts (`PreparedData.tokens_per_byte`), None for other data.
    """

    sums: tuple[float, ...]
    num_targets: int
    tokens_per_byte: float | None = None

    @property
    def loss(self) -> float:
        return self.sums[0] / self.num_targets


class Measures(Protocol):
    """The reading of a task's statistics.

    They are additive: the last block returns them for a micro-batch, float64 [num_sums], index 0
    the loss summed over targets.
    """

    @property
    def num_sums(self) -> int: ...

    @property
    def num_step_sums(self) -> int:
        """The number of sums that the last block returns in training: the loss, then statistics
        that cost nothing more."""

    @property
    def predicts_tokens(self) -> bool:
        """Return whether a unigram model can be compared with it."""

    @property
    def figures(self) -> Mapping[str, Better]:
        """Return the figures of a record by which one model is better than another, and which value
        is better."""

    def num_targets(self, batch: MicroBatch) -> int:
        """Return the number that the sums of a micro-batch are divided by."""

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        """Return a step's record for trackers beside its loss. `means` leaves out the loss."""

    def record(self, result: EvalResult) -> dict[str, float]:
        """Return an evaluation's record for trackers, with names that begin with eval_."""


@dataclass(frozen=True)
class TokenMeasures:
    """The figures of predicted tokens: the loss, how many tokens had the highest logit, and in how
    many documents all of them had.

    `of_answers`: documents are answers, for which the last figure is reported. `of_texts`: every
    token of a text is predicted, so that a loss per byte can be compared between tokenizers.
    `of_translations`: texts can be translated and compared.
    """

    of_answers: bool = False
    of_texts: bool = False
    of_translations: bool = False
    num_sums: int = 4
    num_step_sums: int = 1
    predicts_tokens: bool = True

    @property
    def figures(self) -> Mapping[str, Better]:
        exact: Mapping[str, Better] = {"eval_exact_match": "higher"} if self.of_answers else {}
        per_byte: Mapping[str, Better] = {"eval_bits_per_byte": "lower"} if self.of_texts else {}
        translated = OF_TRANSLATIONS if self.of_translations else {}
        return {LOSS: "lower", "eval_perplexity": "lower", **per_byte, "eval_accuracy": "higher", **exact, **translated}

    def num_targets(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def step_record(self, means: Sequence[float]) -> dict[str, float]:
        return {}

    def record(self, result: EvalResult) -> dict[str, float]:
        """Return the record.

        `eval_bits_per_byte` is that of the Pile (Gao et al. 2020, arXiv:2101.00027, §3.1): the loss
        in bits, times the tokens per byte of all held-out texts.
        """
        per_byte = result.tokens_per_byte if self.of_texts else None
        return {
            "eval_loss": result.loss,
            "eval_perplexity": math.exp(min(result.loss, 700.0)),  # beyond, a float overflows
            **({} if per_byte is None else {"eval_bits_per_byte": result.loss / math.log(2) * per_byte}),
            "eval_accuracy": result.sums[1] / result.num_targets,
            **({"eval_exact_match": result.sums[2] / result.sums[3]} if self.of_answers else {}),
            "eval_targets": result.num_targets,
        }


@dataclass(frozen=True)
class PairMeasures:
    """The figures of preferences: the loss, the rewards of the chosen and the rejected answers with
    the model as a reward model, and the pairs that it orders correctly.

    The names are those of Hugging Face's trl. Its targets are pairs.
    """

    num_sums: int = 4
    num_step_sums: int = 4
    predicts_tokens: bool = False

    @property
    def figures(self) -> Mapping[str, Better]:
        return {
            LOSS: "lower",
            "eval_rewards/chosen": "higher",
            "eval_rewards/rejected": "lower",
            "eval_rewards/margins": "higher",
            "eval_rewards/accuracies": "higher",
        }

    def num_targets(self, batch: MicroBatch) -> int:
        # an odd document at the end of a row is filler
        return sum(len(row) // 2 for row in batch.documents.lengths)

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
    """The figures of a classifier: the loss, and how many texts of class i were predicted as class
    j.

    With more than PAIRED_CLASSES classes: the numbers of right predictions, texts and predictions
    of each.
    """

    num_classes: int
    num_step_sums: int = 1
    predicts_tokens: bool = False

    @property
    def figures(self) -> Mapping[str, Better]:
        second: Mapping[str, Better] = {"eval_f1_positive": "higher"} if self.num_classes == 2 else {}
        return {LOSS: "lower", "eval_accuracy": "higher", "eval_f1": "higher", **second}

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
        """Return the record. `eval_majority`: the accuracy of always predicting the commonest
        class.

        `eval_f1` is the mean over the classes that occur or were predicted (macro); for two classes
        there is also that of the second alone, as in GLUE (Wang et al. 2018, arXiv:1804.07461).
        """
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
        """Return, for each class, the numbers of right predictions, of texts, and of
        predictions."""
        if pairs := self.confusion(result):
            return (
                [row[number] for number, row in enumerate(pairs)],
                list(map(sum, pairs)),
                list(map(sum, zip(*pairs, strict=True))),
            )
        counts, C = [round(count) for count in result.sums[1:]], self.num_classes
        return counts[:C], counts[C : 2 * C], counts[2 * C :]

    def confusion(self, result: EvalResult) -> list[list[int]]:
        """Return the confusion matrix. Row: the true class; column: the predicted class. [] for
        more than PAIRED_CLASSES classes."""
        if not self._paired:
            return []
        counts, C = [round(count) for count in result.sums[1:]], self.num_classes
        return [counts[row * C : (row + 1) * C] for row in range(C)]


def _f1(right: int, there: int, named: int) -> float | None:
    """Return 2 · right / (texts + predictions) of a class; None where both are 0."""
    return 2 * right / (there + named) if there + named else None


def measures_of(task: TaskName, network: Network) -> Measures:
    """Return what an evaluation of a recipe's data.task measures."""
    classes = network.classes if isinstance(network, TransformerConfig) else ()
    return MEASURES[task](len(classes))


def figures_of(task: TaskName, num_classes: int) -> Mapping[str, Better]:
    """Return the figures by which one model of a task is better than another; see `Measures`."""
    return MEASURES[task](num_classes).figures


# For each task its measures, given the number of classes, which is 0 for a network without any.
MEASURES: Mapping[TaskName, Callable[[int], Measures]] = {
    "pretrain": lambda _: TokenMeasures(of_texts=True),
    "mlm": lambda _: TokenMeasures(),
    "sft": lambda _: TokenMeasures(of_answers=True),
    "translate": lambda _: TokenMeasures(of_answers=True, of_translations=True),
    "preference": lambda _: PairMeasures(),
    "classify": ClassMeasures,
}


@dataclass(frozen=True)
class Aim:
    """The figure of evaluations by which a run's models are compared."""

    figure: str
    better: Better

    def value(self, record: Mapping[str, float | int | None]) -> float | None:
        """Return the figure in an evaluation's record; None where there is none, or it is not
        finite: such a model is never the best."""
        value = record.get(self.figure)
        return float(value) if value is not None and math.isfinite(value) else None

    def improves(self, value: float | None, best: float | None) -> bool:
        """Return whether `value` is better than the best so far. An equal one is not."""
        if value is None or best is None:
            return value is not None
        return value < best if self.better == "lower" else value > best
