"""The bytes that a rank holds of micro-batches whose backward is not complete, by its schedule. No
torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from parallel.schedule_table import Kind, ScheduleTable, Step, actions_of
from parallel.schedules import build

# A schedule holds the same in each further round of micro-batches, or more by as much each time: so
# long ones are looked at for two short counts and continued in a straight line.
ROUNDS = 3


class Kept(NamedTuple):
    """The bytes that a stage keeps of a micro-batch until its backward, and, where that is split,
    between the gradients of its inputs and those of its weights."""

    until_backward: int
    until_weights: int = 0


def peak_held(steps: Iterable[Step], of_stage: Mapping[int, Kept]) -> int:
    """Return the most bytes that one rank holds in these steps."""
    held = peak = 0
    for step in steps:
        for action in actions_of(step):
            before, between = of_stage[action.stage]
            held += before * (action.kind is Kind.FORWARD)
            peak = max(peak, held)
            held -= before * (action.kind in (Kind.BACKWARD, Kind.INPUT_GRAD))
            held += between * ((action.kind is Kind.INPUT_GRAD) - (action.kind is Kind.WEIGHT_GRAD))
    return peak


def peak_by_name(
    name: str, *, ranks: int, virtual_stages: int, num_micro_batches: int, rank: int, of_stage: Mapping[int, Kept]
) -> int:
    """Return the most bytes that a rank holds under the schedule of that name."""
    if ranks == 1:
        return max(kept.until_backward for kept in of_stage.values())

    def peak(count: int) -> int:
        return peak_held(_table(name, ranks, virtual_stages, count).steps[rank], of_stage)

    short, long = ROUNDS * ranks * virtual_stages, (ROUNDS + 1) * ranks * virtual_stages
    if num_micro_batches <= long:
        return peak(num_micro_batches)
    first, second = peak(short), peak(long)
    return second + (second - first) * (num_micro_batches - long) // (long - short)


@lru_cache(maxsize=512)
def _table(name: str, ranks: int, virtual_stages: int, count: int) -> ScheduleTable:
    return build(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=count)
