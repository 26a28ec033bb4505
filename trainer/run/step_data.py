"""The data of a run, and of each of its steps on this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.mesh import Group
from trainer.data import PreparedData
from trainer.data.ahead import Ahead
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.targets import Part, Targets, targets_of
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe


def targets_for(recipe: Recipe, prepared: PreparedData, part: Part, *, causal: bool) -> Targets:
    """Return the rule that gives the positions of this run's rows their labels. `causal`: its
    network's tokens see only those before them."""
    return targets_of(recipe.data, prepared.tokenizer, causal=causal, seed=recipe.run.seed, part=part)


def training_data(recipe: Recipe, prepared: PreparedData, *, causal: bool) -> TrainData:
    return TrainData(
        prepared.train,
        prepared.weights,
        row_tokens=recipe.data.row_tokens,
        seed=recipe.run.seed,
        isolate_documents=recipe.data.isolate_documents,
        tails=recipe.data.tails == "train",
        global_sequences=recipe.batch.global_sequences,
        targets=targets_for(recipe, prepared, "training", causal=causal),
    )


def evaluation_data(recipe: Recipe, prepared: PreparedData, *, causal: bool) -> EvalData | None:
    """Return the held-out sequences of an evaluation; None if nothing is held out."""
    if not prepared.evaluation:
        return None
    return EvalData(
        prepared.evaluation,
        row_tokens=recipe.data.row_tokens,
        isolate_documents=recipe.data.isolate_documents,
        sequences=recipe.train.eval_sequences,
        targets=targets_for(recipe, prepared, "evaluation", causal=causal),
    )


@dataclass
class StepData:
    """The micro-batches of each step on this rank; after a rewind, the data after the spike.
    `skipped`: the number of steps whose data are left out from here on."""

    data: TrainData
    group: Group  # the ranks that divide the sequences of a step
    plan: BatchPlan
    reads_tokens: bool
    skipped: int = 0
    device: torch.device | None = None  # a GPU that gets the data from page-locked memory

    def __post_init__(self) -> None:
        self._ahead = Ahead(self._read)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of a step, counted from 0."""
        return self._read(step + self.skipped)

    def take(self, step: int, *, more: bool) -> list[MicroBatch]:
        """Return the same; a thread reads the next step's part meanwhile, if there are `more`."""
        return self._ahead.take(step + self.skipped, more=more)

    def end(self) -> None:
        """Wait for the thread."""
        self._ahead.end()

    def first_sequence(self, step: int) -> int:
        """Return the global number of the first sequence of a step."""
        return (step + self.skipped) * self.plan.global_sequences

    def _read(self, number: int) -> list[MicroBatch]:
        batches = self.data.micro_batches(
            number,
            dp_rank=self.group.rank,
            dp=self.group.size,
            micro_sequences=self.plan.micro_sequences,
            read=self.reads_tokens,
        )
        return [batch if self.device is None else batch.pinned(self.device) for batch in batches]
