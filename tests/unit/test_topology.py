"""The map of ranks: a bijection, and groups that divide the world."""

from __future__ import annotations

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parallel.topology
from parallel.topology import AXES, Coord, Layout

layouts = st.builds(Layout, **{axis: st.integers(1, 4) for axis in AXES})
subsets = st.sets(st.sampled_from(AXES))


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(parallel.topology)
    assert result.attempted >= 5
    assert result.failed == 0


@given(layouts)
def test_ranks_and_coordinates_are_one_to_one(layout: Layout) -> None:
    coords = [layout.coord(rank) for rank in range(layout.world_size)]
    assert [layout.rank(coord) for coord in coords] == list(range(layout.world_size))
    assert set(coords) == {Coord(*places) for places in itertools.product(*map(range, layout.degrees))}
    assert coords == sorted(coords), "pp is the outermost axis, tp the innermost"


@given(layouts, subsets)
def test_groups_divide_the_world(layout: Layout, axes: set[str]) -> None:
    groups = layout.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
    size = 1
    for axis in axes:
        size *= getattr(layout, axis)
    for group in groups:
        assert len(group) == size
        assert list(group) == sorted(group)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@given(layouts, subsets)
def test_a_group_is_the_ranks_that_differ_along_its_axes_only(layout: Layout, axes: set[str]) -> None:
    fixed = [axis for axis in AXES if axis not in axes]
    expected: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        here = layout.coord(rank)
        expected.setdefault(tuple(getattr(here, axis) for axis in fixed), []).append(rank)
    assert layout.groups(*axes) == sorted(map(tuple, expected.values()))
    for group in expected.values():
        assert {layout.peers(rank, *axes) for rank in group} == {tuple(group)}


def test_tensor_ranks_are_neighbours() -> None:
    """They share the fastest link: 8 GPUs of a node hold whole tensor groups of 2, 4 or 8."""
    for tp in (2, 4, 8):
        for group in Layout(pp=2, dp=16 // tp, tp=tp).groups("tp"):
            assert group == tuple(range(group[0], group[0] + tp))
            assert group[0] % tp == 0


@given(layouts)
def test_the_layout_of_fills_the_world(layout: Layout) -> None:
    assert Layout.from_world_size(layout.world_size, pp=layout.pp, cp=layout.cp, tp=layout.tp) == layout


def test_what_is_no_layout_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"world size 12 is not a multiple of tensor 4 \* pipeline 2 \* context 1 = 8"):
        Layout.from_world_size(12, pp=2, tp=4)
    with pytest.raises(ValueError, match="degree of cp is 0; it must be at least 1"):
        Layout(cp=0)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside a world of 4"):
            Layout(dp=4).coord(rank)
