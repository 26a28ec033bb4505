"""A simulation of when each step of a schedule would run: bubbles, micro-batches in flight,
deadlocks. No torch.

A step starts when its rank has finished the step before and its inputs have arrived:

    F of stage s   needs F of s - 1 of the same micro-batch
    B or I of s    needs F of s, and B or I of s + 1
    W of s         needs I of s

A result reaches another rank `latency` after the end of the step that made it, and its own rank at
once. Sending never blocks a rank. This is the model of Qi et al. (arXiv:2401.10241), and it
reproduces their published bubble rates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.schedule_table import Action, Kind, ScheduleTable, Step, actions_of


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The durations of one stage's actions on one micro-batch, in any unit. B takes as long as I
    and W together."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0

    def of(self, kind: Kind) -> float:
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.BACKWARD:
                return self.input_grad + self.weight_grad
            case Kind.INPUT_GRAD:
                return self.input_grad
            case Kind.WEIGHT_GRAD:
                return self.weight_grad


class Span(NamedTuple):
    """A step with its times, in the unit of the costs."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of each rank, `spans[rank]`, in the order of time."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """The time from the first start, 0, to the last end."""
        return max(spans[-1].end for spans in self.spans)

    def bubble_share(self, rank: int | None = None) -> float:
        """Return the idle time divided by the makespan, of one rank or averaged over all."""
        chosen = self.spans if rank is None else (self.spans[rank],)
        busy = sum(span.end - span.start for spans in chosen for span in spans)
        return 1 - busy / (self.makespan * len(chosen))


class Wait(NamedTuple):
    """A rank that stands before `step` because `needs` has not run on rank `holder`, which itself
    stands before `before`."""

    rank: int
    step: Step
    needs: Action
    holder: int
    before: Step

    def __str__(self) -> str:
        where = "which it runs later" if self.holder == self.rank else f"which rank {self.holder} runs after {self.before}"
        return f"rank {self.rank} waits at {self.step} for {self.needs}, {where}"


class Deadlock(ValueError):
    """Ranks that wait for each other in a circle. One that only waits for them is not named."""

    def __init__(self, waits: Sequence[Wait]) -> None:
        self.waits = tuple(waits)
        super().__init__("deadlock: " + "; ".join(map(str, waits)))


def simulate(table: ScheduleTable, costs: Costs | Sequence[Costs] | None = None, *, latency: float = 0.0) -> Timeline:
    """Return the times of all steps. Raises Deadlock if the table cannot run to its end.

    `costs`: one for all stages or one for each; by default a forward, an input gradient and a
    weight gradient take 1 each. An overlapped step starts when both its actions can and takes as
    long as both, because torch runs one after the other.
    """
    of_stage = [costs or Costs()] * table.num_stages if isinstance(costs, Costs | None) else costs
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in table.steps]
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(table.steps):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                arrived = _arrived(step, rank, table, ended, latency)
                if arrived is None:
                    break
                start = max(arrived, spans[rank][-1].end if spans[rank] else 0.0)
                end = start + sum(of_stage[action.stage].of(action.kind) for action in actions_of(step))
                spans[rank].append(Span(step, start, end))
                ended |= dict.fromkeys(actions_of(step), end)
                progress = True
    if waits := _circle(table, [len(done) for done in spans], ended.keys()):
        raise Deadlock(waits)
    return Timeline(tuple(tuple(done) for done in spans))


@dataclass(frozen=True)
class Flow:
    """The steps of a table, each after those that it needs, to time them with many costs.

    Of each step: the actions in it, the number of the one before it on its rank (-1: none), and the
    numbers of those whose results it needs from its own rank, and from others.
    """

    actions: tuple[tuple[tuple[int, Kind], ...], ...]
    before: tuple[int, ...]
    needed: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, table: ScheduleTable) -> Flow:
        """Return the flow of a table. Raises Deadlock if it cannot run to its end."""
        number: dict[Action, int] = {}
        holders = table.rank_of_stage
        done, last = [0] * table.num_ranks, [-1] * table.num_ranks
        actions, before, needed, received = [], [], [], []
        waiting = deque(range(table.num_ranks))
        idle = 0  # ranks in a row that could not go on
        while waiting and idle < len(waiting):
            rank = waiting.popleft()
            idle += 1
            for step in table.steps[rank][done[rank] :]:
                inputs = [(number.get(action, -1), holders[action.stage]) for action in needs(step, table)]
                if any(made < 0 for made, _ in inputs):
                    break
                needed.append(tuple(made for made, holder in inputs if holder == rank and made != last[rank]))
                received.append(tuple(made for made, holder in inputs if holder != rank))
                actions.append(tuple((action.stage, action.kind) for action in actions_of(step)))
                before.append(last[rank])
                last[rank] = len(before) - 1
                number |= dict.fromkeys(actions_of(step), last[rank])
                done[rank] += 1
                idle = 0
            if done[rank] < len(table.steps[rank]):
                waiting.append(rank)
        if waiting:
            simulate(table)  # raises Deadlock, with its circle
        return cls(tuple(actions), tuple(before), tuple(needed), tuple(received))

    def makespan(self, costs: Sequence[Costs], latency: float) -> float:
        """Return the time from the first start to the last end, as `simulate` finds it."""
        lasts = {part: sum(costs[stage].of(kind) for stage, kind in part) for part in set(self.actions)}
        ends: list[float] = []
        for part, before, needed, received in zip(self.actions, self.before, self.needed, self.received, strict=True):
            start = ends[before] if before >= 0 else 0.0
            for number in needed:
                start = max(start, ends[number])
            for number in received:
                start = max(start, ends[number] + latency)
            ends.append(start + lasts[part])
        return max(ends)


def _arrived(step: Step, rank: int, table: ScheduleTable, ended: Mapping[Action, float], latency: float) -> float | None:
    """Return when a step's inputs are on its rank; None if one of them is not computed yet."""
    arrived = 0.0
    for action in needs(step, table):
        end = ended.get(action)
        if end is None:
            return None
        arrived = max(arrived, end + latency * (table.rank_of_stage[action.stage] != rank))
    return arrived


def needs(step: Step, table: ScheduleTable) -> Iterator[Action]:
    """Yield the actions that must have run before this step."""
    if isinstance(step, Action):
        yield from _needs(step, table)
        return
    inside = actions_of(step)
    for action in inside:
        yield from (needed for needed in _needs(action, table) if needed not in inside)


def _needs(action: Action, table: ScheduleTable) -> Iterator[Action]:
    stage, kind, micro_batch = action
    if kind is Kind.FORWARD:
        if stage > 0:
            yield Action(stage - 1, Kind.FORWARD, micro_batch)
    elif kind is Kind.WEIGHT_GRAD:
        yield Action(stage, Kind.INPUT_GRAD, micro_batch)
    else:
        yield Action(stage, Kind.FORWARD, micro_batch)
        if stage + 1 < table.num_stages:
            whole = Action(stage + 1, Kind.BACKWARD, micro_batch)
            yield whole if whole in table.whole_backwards else Action(stage + 1, Kind.INPUT_GRAD, micro_batch)


def _circle(table: ScheduleTable, done: Sequence[int], ended: Iterable[Action]) -> list[Wait]:
    """Return the ranks that wait for each other, starting with the lowest; [] when all have
    finished.

    Every action of a table is somewhere in it, so what a stopped rank waits for stands before it or
    on another stopped rank. Following the waits therefore ends in a circle.
    """
    waits: dict[int, Wait] = {}
    for rank, steps in enumerate(table.steps):
        if done[rank] < len(steps):
            missing = next(action for action in needs(steps[done[rank]], table) if action not in ended)
            holder = table.rank_of_stage[missing.stage]
            waits[rank] = Wait(rank, steps[done[rank]], missing, holder, table.steps[holder][done[holder]])
    route: list[int] = []
    rank = min(waits, default=-1)
    while rank in waits and rank not in route:
        route.append(rank)
        rank = waits[rank].holder
    return [waits[member] for member in route[route.index(rank) :]] if route else []


def peak_in_flight(steps: Iterable[Step]) -> int:
    """Return the largest number of forwards on one rank whose backward is not complete: their
    activations are held at the same time.

    Every stage and micro-batch counts as one; divide by the stages on the rank to get
    micro-batches. A deferred W holds on to its activations.
    """
    held = peak = 0
    for step in steps:
        for action in actions_of(step):
            held += action.kind is Kind.FORWARD
            peak = max(peak, held)
            held -= action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD)
    return peak
