import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel import topology
from parallel.topology import AXES, Layout

degrees = st.integers(1, 5)
layouts = st.builds(Layout, pp=degrees, dp=degrees, cp=degrees, tp=degrees)


def test_the_examples_of_the_docstring_hold() -> None:
    result = doctest.testmod(topology)
    assert result.attempted >= 5
    assert result.failed == 0


@given(layouts)
def test_ranks_and_coordinates_are_the_same_thing(layout: Layout) -> None:
    coords = [layout.coord(rank) for rank in range(layout.world_size)]
    assert len(set(coords)) == layout.world_size
    assert [layout.rank(coord) for coord in coords] == list(range(layout.world_size))


@given(layouts, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_hold_every_rank_once_and_differ_only_along_their_axes(layout: Layout, axes: set[str]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    fixed = [axis for axis in AXES if axis not in axes]
    for group in groups:
        places = {tuple(getattr(layout.coord(rank), axis) for axis in fixed) for rank in group}
        assert len(places) == 1
        assert list(group) == sorted(group)


def test_the_data_parallel_degree_fills_the_world() -> None:
    assert Layout.from_world_size(24, pp=2, tp=3) == Layout(pp=2, dp=4, tp=3)
    with pytest.raises(ValueError, match="world size 10 is not a multiple of tensor 4 "):
        Layout.from_world_size(10, tp=4)


def test_ranks_outside_the_world_and_empty_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        Layout(dp=4).coord(4)
    with pytest.raises(ValueError, match="degree of tp is 0"):
        Layout(tp=0)
