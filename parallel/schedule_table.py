"""A pipeline schedule as a table: for each rank its steps, in the order in which they run. No
processes, no torch.

The notation is that of torch.distributed.pipelining: stage, kind, micro-batch.

    2F0                    forward of stage 2 on micro-batch 0
    2B0                    its backward, or instead, in two parts that may stand apart:
    2I0                      the gradient of its input, for which stage 1 waits
    2W0                      the gradient of its weights, for which nobody waits
    (0F3;7B1)OVERLAP_F_B   a forward and a backward as one step

A CSV file of a schedule has a row for each rank and a step in each cell. An empty cell is a pause
without meaning, because a step starts as soon as its inputs are there. It is the "compute_only"
format of torch's `_PipelineScheduleRuntime._load_csv`.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"


WHOLE = (["B", "F"], ["F", "I", "W"])  # the kinds of a stage's actions on a micro-batch, sorted
IN_ORDER = (["F", "B"], ["F", "I", "W"])  # as they mostly stand


class Action(NamedTuple):
    """The work of one stage on one micro-batch."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Overlap(NamedTuple):
    """A forward and a backward that run as one step."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Step = Action | Overlap


def actions_of(step: Step) -> tuple[Action, ...]:
    return (step.forward, step.backward) if isinstance(step, Overlap) else (step,)


@dataclass(frozen=True)
class ScheduleTable:
    """The steps of each rank in order, `steps[rank]`.

    Every stage is on one rank and does all the work on every micro-batch once; else ValueError.
    Whether the order can run is not checked here, but by the simulator.
    """

    steps: tuple[tuple[Step, ...], ...]

    def __post_init__(self) -> None:
        if problem := next(self._problems(), None):
            raise ValueError(problem)

    def actions(self, rank: int) -> Sequence[Action]:
        return self._actions[rank]

    @cached_property
    def _actions(self) -> tuple[tuple[Action, ...], ...]:
        """The actions of each rank: they are gone through many times."""
        return tuple(tuple(action for step in steps for action in actions_of(step)) for steps in self.steps)

    @property
    def num_ranks(self) -> int:
        return len(self.steps)

    @property
    def num_stages(self) -> int:
        return len(self.rank_of_stage)

    @cached_property
    def num_micro_batches(self) -> int:
        return 1 + max(action.micro_batch for rank in range(self.num_ranks) for action in self.actions(rank))

    @cached_property
    def rank_of_stage(self) -> dict[int, int]:
        return {action.stage: rank for rank in range(self.num_ranks) for action in self.actions(rank)}

    @cached_property
    def whole_backwards(self) -> frozenset[Action]:
        """The backwards that are not split into I and W."""
        actions = (action for rank in range(self.num_ranks) for action in self.actions(rank))
        return frozenset(action for action in actions if action.kind is Kind.BACKWARD)

    @property
    def splits_backward(self) -> bool:
        """Return whether some weight gradient is computed apart from its input gradient."""
        return len(self.whole_backwards) < self.num_stages * self.num_micro_batches

    def stages(self, rank: int) -> list[int]:
        """Return the stages on a rank, in the order of the layers."""
        return sorted(stage for stage, holder in self.rank_of_stage.items() if holder == rank)

    def _problems(self) -> Iterator[str]:
        """Yield what makes the table invalid, in the order in which it is best fixed."""
        if not self.steps:
            yield "it has no ranks"
        yield from (f"rank {rank} has no actions" for rank, steps in enumerate(self.steps) if not steps)
        kinds: defaultdict[tuple[int, int], list[Kind]] = defaultdict(list)
        for rank in range(self.num_ranks):
            for action in self.actions(rank):
                if (holder := self.rank_of_stage[action.stage]) != rank:
                    yield f"stage {action.stage} is on rank {rank} and on rank {holder}; a stage has one rank"
                kinds[action.stage, action.micro_batch].append(action.kind)
        missing = set(range(max(self.rank_of_stage, default=0))) - self.rank_of_stage.keys()
        yield from (f"stage {stage} is on no rank" for stage in sorted(missing)[:1])
        for stage in sorted(self.rank_of_stage):
            for micro_batch in range(self.num_micro_batches):
                found = kinds[stage, micro_batch]
                if found not in IN_ORDER and sorted(found) not in WHOLE:
                    has = ", ".join(found) or "nothing"
                    yield f"stage {stage} has {has} of micro-batch {micro_batch}; it must have F and B or F, I and W, once each"


# ---------------------------------------------------------------------------------------------- CSV

# At most six digits: nobody has a million stages, and a typing error must not fill the memory.
ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})", re.ASCII)
OVERLAP = re.compile(r"\((\w+);(\w+)\)OVERLAP_F_B", re.ASCII)


def read_csv(text: str) -> ScheduleTable:
    """Return the schedule in the text of a CSV file. ValueError with row and column, counted from
    1, if it is not one."""
    try:
        rows = [list(_steps(row, number)) for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1)]
    except csv.Error as error:
        raise ValueError(str(error)) from None
    return ScheduleTable(tuple(tuple(row) for row in rows))


def write_csv(table: ScheduleTable, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([str(step) for step in steps] for steps in table.steps)


def _steps(row: Iterable[str], number: int) -> Iterator[Step]:
    for column, cell in enumerate(row, 1):
        if text := cell.strip():
            step = _action(text) or _overlap(text)
            if step is None:
                legal = "legal: stage, F, B, I or W, micro-batch, as in 2F0; (0F3;7B1)OVERLAP_F_B; or nothing"
                raise ValueError(f"row {number}, column {column}: {text!r} is not an action; {legal}")
            yield step


def _action(text: str) -> Action | None:
    match = ACTION.fullmatch(text)
    return Action(int(match[1]), Kind(match[2]), int(match[3])) if match else None


def _overlap(text: str) -> Overlap | None:
    match = OVERLAP.fullmatch(text)
    forward, backward = (_action(match[1]), _action(match[2])) if match else (None, None)
    if forward is None or backward is None:
        return None
    is_pair = forward.kind is Kind.FORWARD and backward.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)
    return Overlap(forward, backward) if is_pair else None
