"""The bytes that a rank holds of micro-batches whose backward is not complete, by its schedule. No
torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from parallel.schedule_table import Kind, Step, actions_of
from parallel.schedules import SCHEDULES

# A schedule holds the same in each further round of micro-batches, or more by as much each time: so
# long ones are looked at for two short counts and continued in a straight line.
ROUNDS = 3


class Kept(NamedTuple):
    """The bytes that a stage keeps of a micro-batch until its backward, and, where that is split,
    between the gradients of its inputs and those of its weights."""

    until_backward: int
    until_weights: int = 0


class InFlight(NamedTuple):
    """The micro-batches of each stage of a rank whose backward is not complete: those that wait for
    all of it, and those that wait for the gradients of weights alone."""

    whole: Counter[int]
    weights: Counter[int]

    def num_bytes(self, of_stage: Mapping[int, Kept]) -> int:
        return sum(
            kept.until_backward * self.whole[stage] + kept.until_weights * self.weights[stage]
            for stage, kept in of_stage.items()
        )


def most_in_flight(steps: Iterable[Step], of_stage: Mapping[int, Kept]) -> InFlight:
    """Return the micro-batches in flight on one rank when they hold the most bytes."""
    whole: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    held = peak = 0
    found = InFlight(Counter(), Counter())
    for step in steps:
        for stage, kind, _ in actions_of(step):
            before, between = of_stage[stage]
            if kind is Kind.FORWARD:
                held += before
                whole[stage] += 1
                if held > peak:
                    peak, found = held, InFlight(whole.copy(), weights.copy())
            if kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
                held -= before
                whole[stage] -= 1
            if kind in (Kind.INPUT_GRAD, Kind.WEIGHT_GRAD):
                change = 1 if kind is Kind.INPUT_GRAD else -1
                held += change * between
                weights[stage] += change
    return found


def by_name(
    name: str, *, ranks: int, virtual_stages: int, num_micro_batches: int, rank: int, of_stage: Mapping[int, Kept]
) -> InFlight:
    """Return the micro-batches in flight on a rank under the schedule of that name, at its peak."""

    kept = tuple(of_stage.items())

    def at_peak(count: int) -> InFlight:
        return _at_peak(name, ranks, virtual_stages, count, rank, kept)

    # Rounds of more micro-batches than ranks become rounds of as many only in longer steps.
    rounds = ranks if num_micro_batches % ranks == 0 else ranks * virtual_stages
    short, long = ROUNDS * rounds, (ROUNDS + 1) * rounds
    if num_micro_batches <= long:
        return at_peak(num_micro_batches)
    parts = (
        Counter({stage: _continued(first[stage], second[stage], short, long, num_micro_batches) for stage in of_stage})
        for first, second in zip(at_peak(short), at_peak(long), strict=True)
    )
    return InFlight(*parts)


def _continued(first: int, second: int, short: int, long: int, count: int) -> int:
    return second + (second - first) * (count - long) // (long - short)


@lru_cache(maxsize=8192)  # layouts that differ in what is divided have the same in flight
def _at_peak(name: str, ranks: int, virtual_stages: int, count: int, rank: int, kept: tuple[tuple[int, Kept], ...]) -> InFlight:
    schedule = SCHEDULES[name]
    return most_in_flight(schedule.order(schedule.place(rank, ranks, virtual_stages), count), dict(kept))
