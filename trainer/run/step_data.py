"""The data of each step on this rank."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.mesh import Group
from trainer.data.loader import MicroBatch, TrainData
from trainer.recipe.batch_plan import BatchPlan


@dataclass
class StepData:
    """The micro-batches of each step on this rank; after a rewind, the data after the spike.
    `skipped`: the number of steps whose data are left out from here on."""

    data: TrainData
    group: Group  # the ranks that divide the sequences of a step
    plan: BatchPlan
    reads_tokens: bool
    skipped: int = 0

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of a step, counted from 0."""
        return list(
            self.data.micro_batches(
                step + self.skipped,
                dp_rank=self.group.rank,
                dp=self.group.size,
                micro_sequences=self.plan.micro_sequences,
                read=self.reads_tokens,
            )
        )

    def first_sequence(self, step: int) -> int:
        """Return the global number of the first sequence of a step."""
        return (step + self.skipped) * self.plan.global_sequences
