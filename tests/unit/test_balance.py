"""Stages as equal as they can be: every division is tried, and none is better."""

from __future__ import annotations

import doctest
import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parallel.balance
from parallel.balance import balance, loads_of_ranks
from parallel.schedules import SCHEDULES, build
from parallel.simulator import Costs, simulate


def test_doctests() -> None:
    result = doctest.testmod(parallel.balance)
    assert result.attempted > 0
    assert result.failed == 0


def divisions(costs: Sequence[int], stages: int) -> Iterator[tuple[list[int], list[int]]]:
    """(numbers of blocks, costs) of the stages, for every way to divide."""
    for inner in combinations(range(1, len(costs)), stages - 1):
        parts = list(pairwise((0, *inner, len(costs))))
        yield [end - first for first, end in parts], [sum(costs[first:end]) for first, end in parts]


def best_division(costs: Sequence[int], stages: int) -> list[int]:
    return min((max(found), sum(cost * cost for cost in found), numbers) for numbers, found in divisions(costs, stages))[2]


def sizes(costs: Sequence[int], rank_of_stage: Sequence[int]) -> list[int]:
    parts = balance(costs, rank_of_stage)
    assert [block for part in parts for block in part] == list(range(len(costs)))
    return [len(part) for part in parts]


def stage_costs(costs: Sequence[int], rank_of_stage: Sequence[int]) -> list[int]:
    return [sum(costs[block] for block in part) for part in balance(costs, rank_of_stage)]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Blocks and stages; small costs for many ties, large ones as FLOPs are."""
    most = draw(st.sampled_from([1, 3, 50, 10**18]))
    costs = draw(st.lists(st.integers(0, most), min_size=1, max_size=10))
    return costs, draw(st.integers(1, len(costs)))


@given(rows())
def test_one_stage_on_each_rank_is_the_best_division_of_all(row: tuple[list[int], int]) -> None:
    assert sizes(row[0], range(row[1])) == best_division(*row)


def test_costs_without_ties_too() -> None:
    """Numbers that hypothesis hardly draws: all of one size and none alike, so that the order of the cuts decides."""
    stream = random.Random(0)
    for _ in range(500):
        costs = [stream.randrange(10**15) for _ in range(9)]
        stages = stream.randint(2, 8)
        assert sizes(costs, range(stages)) == best_division(costs, stages)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Equal layers, of which the first and the last carry the embedding and the head; two stages on each rank."""
    ranks = draw(st.integers(2, 3))
    layer = draw(st.integers(1, 20))
    costs = [layer] * draw(st.integers(2 * ranks, 13))
    costs[0] += draw(st.integers(0, 20))
    costs[-1] += draw(st.integers(0, 80))
    schedule = SCHEDULES[draw(st.sampled_from(["interleaved_1f1b", "zbv"]))]
    return costs, schedule.rank_of_stage(ranks, 2)


@given(models())
def test_ranks_of_several_stages_have_the_least_largest_load(model: tuple[list[int], list[int]]) -> None:
    costs, rank_of_stage = model
    best = min(max(loads_of_ranks(found, rank_of_stage)) for _, found in divisions(costs, len(rank_of_stage)))
    assert max(loads_of_ranks(stage_costs(costs, rank_of_stage), rank_of_stage)) == best


@given(rows(), st.data())
def test_levelling_ranks_never_costs(row: tuple[list[int], int], data: st.DataObject) -> None:
    costs, stages = row
    ranks = data.draw(st.integers(1, stages))
    rank_of_stage = [stage % ranks for stage in range(stages)]
    levelled = max(loads_of_ranks(stage_costs(costs, rank_of_stage), rank_of_stage))
    assert levelled <= max(loads_of_ranks(stage_costs(costs, range(stages)), rank_of_stage))


def test_what_is_left_over_goes_to_the_last_stages() -> None:
    assert sizes([1] * 10, range(4)) == [2, 2, 3, 3]
    assert sizes([7] * 22, [0, 1, 2, 3] * 2) == [2, 2, 3, 3, 3, 3, 3, 3]


def test_a_stage_that_cannot_be_cheaper_leaves_the_others_even() -> None:
    assert sizes([1] * 12 + [50], range(4)) == [4, 4, 4, 1]


@pytest.mark.parametrize("name", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
def test_levelled_ranks_make_a_step_shorter(name: str) -> None:
    """16 layers and a head as dear as 4, on 3 ranks of 2 stages; simulated, so that it is the same everywhere."""
    table = build(name, ranks=3, virtual_stages=2, num_micro_batches=12)
    rank_of_stage = [table.rank_of_stage[stage] for stage in range(6)]
    costs = [11, *[10] * 14, 50]

    def step(stages: list[int]) -> float:
        return simulate(table, [Costs(forward=cost, input_grad=cost, weight_grad=cost) for cost in stages]).makespan

    # 0.951, 0.926 and 0.908; the order of the two is what is tested.
    assert step(stage_costs(costs, rank_of_stage)) < 0.96 * step(stage_costs(costs, range(6)))


def test_many_blocks_and_stages() -> None:
    """Equal blocks and a dear end, where many divisions are equally good: the search is not one through all of them."""
    costs = [2**40] * 2000
    costs[-1] += 30 * 2**40
    numbers = sizes(costs, range(200))
    assert numbers[-1] == 1
    assert set(numbers[:-1]) == {10, 11}


@pytest.mark.parametrize(("costs", "stages"), [([1, 2], 3), ([], 1), ([1, -1], 1), ([1], 0)])
def test_what_cannot_be_divided(costs: list[int], stages: int) -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        balance(costs, range(stages))
