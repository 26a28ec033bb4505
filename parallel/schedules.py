"""The schedules known by name, as tables, in the same order as torch.distributed.pipelining's
classes.

They are written out here without torch, so that a login node can check and draw them. A test
compares them with torch's.

>>> table = build("1f1b", ranks=2, virtual_stages=1, num_micro_batches=3)
>>> [" ".join(map(str, steps)) for steps in table.steps]
['0F0 0F1 0B0 0F2 0B1 0B2', '1F0 1B0 1F1 1B1 1F2 1B2']

With p ranks and v stages on each, stage s is on rank s mod p, so that a micro-batch passes all
ranks v times. The V-shaped schedules run it down the ranks and up again, so that the first and the
last stage share rank 0.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from parallel.schedule_table import Action, Kind, Overlap, ScheduleTable, Step


class Place(NamedTuple):
    """A rank's place in the pipeline, and the stages on it in the order of the layers."""

    rank: int
    ranks: int
    stages: tuple[int, ...]

    @property
    def hops_to_last_rank(self) -> int:
        return self.ranks - 1 - self.rank


@dataclass(frozen=True)
class Schedule:
    """A named schedule; `order(place, number of micro-batches)` returns the steps of one rank.

    `virtual_stages`: the number of stages per rank that it requires, or None if any will do.
    `splits_backward`: it runs I and W apart. `accepts(micro-batches, ranks)`: whether torch's class
    takes that many. `needs` says the same in words, with {ranks} to fill in.
    """

    source: str
    order: Callable[[Place, int], list[Step]]
    virtual_stages: int | None = None
    v_shaped: bool = False
    splits_backward: bool = False
    accepts: Callable[[int, int], bool] = lambda micro_batches, ranks: True
    needs: str = "at least 1 micro-batch"

    def place(self, rank: int, ranks: int, virtual_stages: int) -> Place:
        if self.v_shaped:
            return Place(rank, ranks, (rank, 2 * ranks - 1 - rank))
        return Place(rank, ranks, tuple(range(rank, ranks * virtual_stages, ranks)))

    def rank_of_stage(self, ranks: int, virtual_stages: int) -> list[int]:
        places = [self.place(rank, ranks, virtual_stages) for rank in range(ranks)]
        ranks_of_stages = sorted((stage, place.rank) for place in places for stage in place.stages)
        return [rank for _, rank in ranks_of_stages]

    def nearest_micro_batches(self, wanted: int, ranks: int) -> list[int]:
        """Return the accepted numbers nearest to `wanted`: the one below, if there is one, and the
        one above.

        The search ends, because every multiple of 2 · ranks is accepted.
        """
        above = next(n for n in range(wanted + 1, wanted + 2 * ranks + 1) if self.accepts(n, ranks))
        below = next((n for n in range(wanted - 1, 0, -1) if self.accepts(n, ranks)), None)
        return [above] if below is None else [below, above]


def build(name: str, *, ranks: int, virtual_stages: int, num_micro_batches: int) -> ScheduleTable:
    """Return the table of a named schedule.

    ValueError if the schedule does not run with this number of stages per rank or of micro-batches.
    """
    schedule = SCHEDULES[name]
    if schedule.virtual_stages not in (None, virtual_stages):
        raise ValueError(f"{name} has {schedule.virtual_stages} stages per rank, not {virtual_stages}")
    if num_micro_batches < 1 or not schedule.accepts(num_micro_batches, ranks):
        raise ValueError(f"{name} needs {schedule.needs.format(ranks=ranks)}, not {num_micro_batches}")
    places = [schedule.place(rank, ranks, virtual_stages) for rank in range(ranks)]
    return ScheduleTable(tuple(tuple(schedule.order(place, num_micro_batches)) for place in places))


# ---------------------------------------------------------------- one stage after another in a loop


def _gpipe(place: Place, micro_batches: int) -> list[Step]:
    (stage,) = place.stages
    return _all(Kind.FORWARD, stage, range(micro_batches)) + _all(Kind.BACKWARD, stage, range(micro_batches))


def _looped_bfs(place: Place, micro_batches: int) -> list[Step]:
    """Return the steps breadth first: all micro-batches through one stage, then the next; backward
    in reverse."""
    steps = [step for stage in place.stages for step in _all(Kind.FORWARD, stage, range(micro_batches))]
    for stage in reversed(place.stages):
        steps += _all(Kind.BACKWARD, stage, reversed(range(micro_batches)))
    return steps


def _one_f_one_b(place: Place, micro_batches: int) -> list[Step]:
    """Return 1F1B's steps: only as many forwards run ahead as keep the last rank busy."""
    return _alternate(place, per_round=micro_batches, rounds=1, ahead=place.hops_to_last_rank)


def _interleaved_1f1b(place: Place, micro_batches: int) -> list[Step]:
    """Return the steps depth first in rounds: one round's micro-batches pass all stages of the rank
    before the next round starts.

    Two forwards run ahead for each hop to the last rank: by the time the gradient is back, as many
    more can have started.
    """
    return _alternate(place, *_rounds(micro_batches, place.ranks), ahead=2 * place.hops_to_last_rank)


def _interleaved_zero_bubble(place: Place, micro_batches: int) -> list[Step]:
    """Return the interleaved steps with split backwards; with one stage per rank it is ZB-H1.

    Other ranks wait only for I, so one forward ahead per hop is enough. A rank that would wait at
    the end has deferred as many W as there are hops before it.
    """
    steps = _alternate(place, *_rounds(micro_batches, place.ranks), ahead=place.hops_to_last_rank)
    return _split_backwards(steps, weight_grads_put_off=place.rank)


def _rounds(micro_batches: int, ranks: int) -> tuple[int, int]:
    """Return (micro-batches per round, rounds). A round has at least one micro-batch per rank, if
    there are so many."""
    rounds = max(1, micro_batches // ranks)
    return micro_batches // rounds, rounds


def _in_equal_rounds(micro_batches: int, ranks: int) -> bool:
    per_round, rounds = _rounds(micro_batches, ranks)
    return per_round * rounds == micro_batches


def _alternate(place: Place, per_round: int, rounds: int, *, ahead: int) -> list[Step]:
    """Return a warm-up of forwards, then one forward and one backward in turn, then the remaining
    backwards.

    The warm-up is a round through all stages but the last, and `ahead` more forwards.
    """
    batches = [range(n * per_round, (n + 1) * per_round) for n in range(rounds)]
    forwards = [step for batch in batches for stage in place.stages for step in _all(Kind.FORWARD, stage, batch)]
    backwards = [step for batch in batches for stage in place.stages[::-1] for step in _all(Kind.BACKWARD, stage, batch)]
    warmup = min((len(place.stages) - 1) * per_round + ahead, len(forwards))
    steady = len(forwards) - warmup
    pairs = [step for pair in zip(forwards[warmup:], backwards[:steady], strict=True) for step in pair]
    return forwards[:warmup] + pairs + backwards[steady:]


def _split_backwards(steps: list[Step], *, weight_grads_put_off: int) -> list[Step]:
    """Replace every B by I, with its W that many backwards later, and the last W at the end."""
    split: list[Step] = []
    pending: deque[Action] = deque()
    for step in steps:
        assert isinstance(step, Action)
        if step.kind is not Kind.BACKWARD:
            split.append(step)
            continue
        split.append(step._replace(kind=Kind.INPUT_GRAD))
        pending.append(step._replace(kind=Kind.WEIGHT_GRAD))
        if len(pending) > weight_grads_put_off:
            split.append(pending.popleft())
    return split + list(pending)


def _all(kind: Kind, stage: int, micro_batches: Iterable[int]) -> list[Step]:
    return [Action(stage, kind, micro_batch) for micro_batch in micro_batches]


# ---------------------------------------------------------------------------- down the ranks and up


class _Counted:
    """A list of steps that numbers them: each kind at each stage takes the next micro-batch, and W
    the oldest whose I has run."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._next: Counter[tuple[int, Kind]] = Counter()
        self._weight_grads: deque[Action] = deque()

    def count(self, stage: int, kind: Kind) -> int:
        return self._next[stage, kind]

    def forward(self, stage: int) -> None:
        self.steps.append(self._take(stage, Kind.FORWARD))

    def backward(self, stage: int, *, split: bool = False) -> None:
        if not split:
            self.steps.append(self._take(stage, Kind.BACKWARD))
            return
        action = self._take(stage, Kind.BACKWARD)
        self.steps.append(action._replace(kind=Kind.INPUT_GRAD))
        self._weight_grads.append(action._replace(kind=Kind.WEIGHT_GRAD))

    def overlap(self, forward_stage: int, backward_stage: int) -> None:
        self.steps.append(Overlap(self._take(forward_stage, Kind.FORWARD), self._take(backward_stage, Kind.BACKWARD)))

    def weight_grad(self, stage: int | None = None) -> bool:
        """Add the oldest deferred W, of that stage or of any. False if there is none."""
        waiting = [action for action in self._weight_grads if stage in (None, action.stage)][:1]
        for action in waiting:
            self._weight_grads.remove(action)
            self.steps.append(action)
        return bool(waiting)

    def _take(self, stage: int, kind: Kind) -> Action:
        micro_batch = self._next[stage, kind]
        self._next[stage, kind] += 1
        return Action(stage, kind, micro_batch)


def _zbv(place: Place, micro_batches: int) -> list[Step]:
    """Return the steps of ZB-V (section 6), which has no bubble between a rank's first and last
    step if F, I and W take equally long.

    The order is drawn for at least 2p - 1 micro-batches, the fewest that fill the pipeline; those
    above `micro_batches` are left out.
    """
    down, up = place.stages
    drawn = max(2 * place.ranks - 1, micro_batches)
    steps = _Counted()

    def backward(stage: int) -> None:
        steps.backward(stage, split=True)
        steps.weight_grad(stage)

    for _ in range(2 * place.hops_to_last_rank + 1):
        steps.forward(down)
    for _ in range(place.rank):
        steps.forward(up)
        steps.forward(down)
    for _ in range(place.hops_to_last_rank + 1):
        steps.forward(up)
        backward(up)
    while steps.count(up, Kind.FORWARD) < drawn:
        if steps.count(down, Kind.FORWARD) < drawn:
            steps.forward(down)
        backward(down)
        steps.forward(up)
        backward(up)
    for _ in range(place.rank):  # their W come later, because the neighbours wait for the I
        steps.backward(down, split=True)
        steps.backward(up, split=True)
    for _ in range(place.hops_to_last_rank + 1):
        backward(down)
    while steps.weight_grad(up):
        pass
    while steps.weight_grad(down):
        pass
    return [step for step in steps.steps if isinstance(step, Action) and step.micro_batch < micro_batches]


def _dualpipev(place: Place, micro_batches: int) -> list[Step]:
    """Return DeepSeek's eight phases. In the main one every step is a forward of one stage and a
    backward of the other."""
    down, up = place.stages
    hops = place.hops_to_last_rank
    steps = _Counted()
    for _ in range(2 * hops):  # 1
        steps.forward(down)
    for _ in range(place.rank + 1):  # 2
        steps.forward(down)
        steps.forward(up)
    for _ in range(hops):  # 3
        steps.backward(up, split=True)
        steps.weight_grad()
        steps.forward(up)
    for turn in range(micro_batches - 2 * place.ranks + place.rank + 1):  # 4
        if turn == 0 and hops == 0:  # the last rank: no other rank's forward waits for its backward
            steps.forward(down)
            steps.backward(up)
        else:
            steps.overlap(down, up)
        steps.overlap(up, down)
    for _ in range(hops):  # 5
        steps.backward(up)
        steps.overlap(up, down)
    # 6: the second half of these backwards is split, and its W are kept to fill the end.
    backwards = [up, down] * (place.rank + 1)
    first_split = 2 * ((place.rank + 1) // 2) + (place.rank % 2 == 0)
    for turn, stage in enumerate(backwards):
        steps.backward(stage, split=turn >= first_split)
    for _ in range(hops):  # 7
        steps.weight_grad()
        steps.backward(down, split=True)
    while steps.weight_grad():  # 8
        pass
    return steps.steps


SCHEDULES = {
    "gpipe": Schedule("Huang et al. 2019, arXiv:1811.06965", _gpipe, virtual_stages=1),
    "1f1b": Schedule(
        "Narayanan et al. 2019 (PipeDream-Flush in arXiv:2006.09503)",
        _one_f_one_b,
        virtual_stages=1,
    ),
    "interleaved_1f1b": Schedule(
        "Narayanan et al. 2021, arXiv:2104.04473",
        _interleaved_1f1b,
        accepts=_in_equal_rounds,
        needs="micro-batches in equal rounds: a multiple of (micro-batches // {ranks})",
    ),
    "looped_bfs": Schedule("Lamy-Poirier 2022, arXiv:2211.05953", _looped_bfs),
    "interleaved_zero_bubble": Schedule(
        "Qi et al. 2023, arXiv:2401.10241",
        _interleaved_zero_bubble,
        splits_backward=True,
        accepts=_in_equal_rounds,
        needs="micro-batches in equal rounds: a multiple of (micro-batches // {ranks})",
    ),
    "zbv": Schedule("Qi et al. 2023, arXiv:2401.10241, section 6", _zbv, virtual_stages=2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(
        "DeepSeek-AI 2024, arXiv:2412.19437, in its V shape",
        _dualpipev,
        virtual_stages=2,
        v_shaped=True,
        splits_backward=True,
        accepts=lambda micro_batches, ranks: micro_batches >= 2 * ranks,
        needs="at least 2 · {ranks} micro-batches, one for each stage",
    ),
}
