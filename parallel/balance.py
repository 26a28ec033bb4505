"""A division of a row of blocks into contiguous pipeline stages of nearly equal cost. No torch.

>>> balance([1, 1, 1, 1, 1, 4], rank_of_stage=[0, 1, 2])
[range(0, 2), range(2, 5), range(5, 6)]

With one stage on each rank, `balance` finds, among all divisions into stages of at least one block,
exactly the one with

1. the least cost of its most expensive stage. That stage sets the pace: the pipeline passes one
   micro-batch in that time;
2. among these, the least sum of squares: the other stages stay as far below the most expensive one
   as they can, which leaves slack where a cost was estimated too low;
3. among these, the fewest blocks on the first stages, which hold the activations of the most
   micro-batches.

With several stages on a rank, the pace is set by the rank whose stages cost the most together. No
efficient way is known to find the best sums of scattered stages among all divisions, so the
division above is only the start: blocks then move away from the busiest rank as long as that levels
the loads. Where all blocks but the first and the last cost the same, as in most models, no division
has a lower largest load. Levelling pays: with 16 layers and a head as expensive as 4 of them, on 3
ranks of 2 stages, a simulated interleaved 1F1B step of 12 micro-batches is 5 % shorter than with
the division that minimizes the most expensive stage, and a step of ZB-V 9 % shorter.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

PATIENCE = 16  # steps, after which a price is sought by halving


def balance(costs: Sequence[int], rank_of_stage: Sequence[int]) -> list[range]:
    """Return the blocks of each stage. ValueError if a cost is negative or a stage would have no
    block.

    Costs are whole numbers in any unit, as small as needed: their sums are exact, so equal sums are
    ties.
    """
    stages = len(rank_of_stage)
    if not 1 <= stages <= len(costs) or min(costs) < 0:
        raise ValueError(f"{len(costs)} blocks, which must cost 0 or more, cannot be divided into {stages} stages")
    sums = [0, *accumulate(costs)]
    cuts = _smoothest(sums, stages, _least_limit(sums, stages))
    if len(set(rank_of_stage)) < stages:
        cuts = _level(sums, cuts, rank_of_stage)
    return [range(first, end) for first, end in pairwise(cuts)]


def loads_of_ranks(costs: Sequence[int], rank_of_stage: Sequence[int]) -> list[int]:
    """Return the total cost of each rank's stages, given the cost of each stage."""
    loads = [0] * (1 + max(rank_of_stage))
    for cost, rank in zip(costs, rank_of_stage, strict=True):
        loads[rank] += cost
    return loads


# ------------------------------------------------------------------------- several stages on a rank


def _level(sums: Sequence[int], cuts: list[int], rank_of_stage: Sequence[int]) -> list[int]:
    """Move one block at a time from the busiest rank to where it helps most, while it helps."""

    def unevenness(cuts: Sequence[int]) -> tuple[int, ...]:
        stages = _costs_of(sums, cuts)
        ranks = loads_of_ranks(stages, rank_of_stage)
        return max(ranks), _squares(ranks), max(stages), _squares(stages)

    least = unevenness(cuts)
    while True:
        ranks = loads_of_ranks(_costs_of(sums, cuts), rank_of_stage)
        busiest = ranks.index(max(ranks))
        givers = [stage for stage, rank in enumerate(rank_of_stage) if rank == busiest]
        moved = min(((unevenness(moved), moved) for moved in _moves(cuts, givers)), default=(least, cuts))
        if moved[0] >= least:
            return cuts
        least, cuts = moved


def _moves(cuts: list[int], givers: Sequence[int]) -> Iterator[list[int]]:
    """Yield every division that has one block fewer on one of the stages `givers` and one more on
    another stage. All stages between the two shift by a block."""
    for giver in givers:
        if cuts[giver + 1] - cuts[giver] > 1:
            for taker in range(len(cuts) - 1):
                low, high = sorted((giver, taker))
                shift = 1 if taker < giver else -1
                if low != high:
                    yield [cut + shift if low < place <= high else cut for place, cut in enumerate(cuts)]


def _costs_of(sums: Sequence[int], cuts: Sequence[int]) -> list[int]:
    return [sums[end] - sums[first] for first, end in pairwise(cuts)]


def _squares(costs: Sequence[int]) -> int:
    return sum(cost * cost for cost in costs)


# --------------------------------------------------------------------------- one stage on each rank


def _least_limit(sums: Sequence[int], stages: int) -> int:
    """Return the cost of the most expensive part in the division where that cost is least
    (parametric search)."""
    dearest = max(end - first for first, end in pairwise(sums))
    low = max(dearest, -(-sums[-1] // stages))
    # Parts filled one after another end at most one block short of the mean: `high` always fits.
    return _least(low, low + dearest, lambda limit: _fits(sums, stages, limit))


def _fits(sums: Sequence[int], stages: int, limit: int) -> bool:
    """Return whether `stages` parts of at most `limit`, filled one after another, take all blocks.

    Fewer parts than `stages` are enough: parts can always be divided further.
    """
    position = 0
    for _ in range(stages):
        position = bisect_right(sums, sums[position] + limit) - 1
    return position == len(sums) - 1


def _smoothest(sums: Sequence[int], stages: int, limit: int) -> list[int]:
    """Return the boundaries of the parts, each at most `limit`, whose sum of squares is least.

    The number of parts is not a second dimension of the search: each part has a price instead. The
    least sum of squares is convex in the number of parts (the squares fulfil the quadrangle
    inequality), so some price makes `stages` parts the best choice. At a price between two whole
    numbers one number of parts is the best. Sums are doubled here, so that odd prices are such
    prices. At the even price between the last odd one that allows too many parts and the first that
    does not, `stages` is among the best numbers.
    """
    half = 2 * _half_price(sums, stages, limit)
    few, many = _cheapest(sums, limit, half + 1), _cheapest(sums, limit, half - 1)
    total = [tail.total - tail.parts for tail in few]  # at the price between the two
    cuts = [0]
    for left in reversed(range(stages)):
        here = cuts[-1]
        cuts.append(
            next(
                end
                for end in range(here + 1, len(sums))
                if total[here] == 2 * (sums[end] - sums[here]) ** 2 + half + total[end]
                and few[end].parts <= left <= many[end].parts
            )
        )
    return cuts


def _half_price(sums: Sequence[int], stages: int, limit: int) -> int:
    """Return the least h such that the price 2 h + 1 allows no more than `stages` parts.

    Between a price that allows too many parts and one that does not, the next one tried is that at
    which both numbers of parts cost the same: it finds the price after a few steps, where halving
    would take one for each bit of a square.
    """
    low, high = 0, sums[-1] ** 2
    many = _Tail(2 * _squares(_costs_of(sums, range(len(sums)))), len(sums) - 1)  # without a price
    few = _unpriced(sums, limit, high)
    steps = 0
    while low < high:
        steps += 1
        if steps > PATIENCE or few.parts >= many.parts:
            half = (low + high) // 2
        else:
            price = -(-(few.total - many.total) // (many.parts - few.parts))
            half = min(max(price // 2, low), high - 1)
        found = _unpriced(sums, limit, half)
        if found.parts <= stages:
            high, few = half, found
        else:
            low, many = half + 1, found
    return low


def _unpriced(sums: Sequence[int], limit: int, half: int) -> _Tail:
    """Return the cheapest division of all blocks at the price 2 `half` + 1, without that price."""
    total, parts = _cheapest(sums, limit, 2 * half + 1)[0]
    return _Tail(total - (2 * half + 1) * parts, parts)


class _Tail(NamedTuple):
    """The cheapest division of the blocks from one on: its doubled squares plus the price of its
    parts, and its number of parts."""

    total: int
    parts: int


class _Cut(NamedTuple):
    """A choice for the next part's end: `end` is the best for parts that begin at `until` or
    before."""

    end: int
    until: int


def _cheapest(sums: Sequence[int], limit: int, price: int) -> list[_Tail]:
    """Return, for each first block, the cheapest division of the blocks from there on, where a part
    costs twice its square plus `price` and holds at most `limit`.

    Works from the last block to the first. Of two ends, the nearer one is the better for all parts
    that begin early enough, so the ends worth choosing form a queue: the farthest is the best now,
    and each next one takes its place at `until`.
    """
    last = len(sums) - 1
    tails = [_Tail(0, 0)] * (last + 1)
    queue: deque[_Cut] = deque()

    def overtakes(near: int, far: int) -> int:
        """Return the last beginning from which `near` is as good an end as `far`, or `far` is over
        the limit."""
        too_far = bisect_left(sums, sums[far] - limit) - 1
        gain = 2 * sums[far] ** 2 + tails[far].total - 2 * sums[near] ** 2 - tails[near].total
        if (between := 4 * (sums[far] - sums[near])) == 0:
            return last if gain >= 0 else too_far
        return max(too_far, bisect_right(sums, gain // between) - 1)

    for here in range(last - 1, -1, -1):
        near, until = here + 1, last
        while queue and (until := overtakes(near, queue[-1].end)) >= queue[-1].until:
            queue.pop()
        queue.append(_Cut(near, until if queue else last))
        while len(queue) > 1 and queue[1].until >= here:
            queue.popleft()
        end = queue[0].end
        square = (sums[end] - sums[here]) ** 2
        tails[here] = _Tail(2 * square + price + tails[end].total, 1 + tails[end].parts)
    return tails


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the least number for which `holds`, which must hold for `high` and for all numbers
    above the least."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
