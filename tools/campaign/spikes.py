"""Data that spikes, with which rewinds are tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.loader import TrainData
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.step_data import StepData


def plant_spikes(positions: Sequence[int], leave_out: tuple[int, int] = (0, 0)) -> None:
    """Make the data of some steps give gradients 100 times too large, on a rank before it trains.

    `leave_out` (step, steps): from that step on so many steps of data are left out, as a rewind
    would do.
    """
    factor, read, take, under_way = BatchPlan.loss_factor, TrainData.micro_batches, StepData.take, [0]
    first, count = leave_out

    def given(number: int) -> int:
        return number + (count if number >= first else 0)

    def reading(data: TrainData, step: int, **named: Any) -> Any:
        return read(data, given(step), **named)

    def taking(data: StepData, step: int, *, more: bool) -> Any:
        under_way[0] = given(step + data.skipped)
        return take(data, step, more=more)

    def spiking(plan: BatchPlan, num_targets: int, *, averaged_over: int) -> float:
        return factor(plan, num_targets, averaged_over=averaged_over) * (100.0 if under_way[0] in positions else 1.0)

    BatchPlan.loss_factor, TrainData.micro_batches = spiking, reading  # type: ignore[method-assign]
    StepData.take = taking  # type: ignore[method-assign]
