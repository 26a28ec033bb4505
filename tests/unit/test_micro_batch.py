"""The largest micro-batch that fits: which sizes are tried, and what a recipe may say beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.end_to_end.runs import write_recipe
from trainer.cli import main
from trainer.recipe import load
from trainer.run.micro_batch import Kept, largest_that_fits, legal_sizes, told
from trainer.schema import Recipe


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=40, unique=True), st.integers(0, 2**20))
def test_the_largest_that_fits_is_found(sizes: list[int], room: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    sizes = sorted(sizes)
    found = largest_that_fits(sizes, fits)
    assert found == max((size for size in sizes if size <= room), default=None)
    assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length()


def test_where_the_plan_is_right_one_trial_is_enough() -> None:
    tried: list[int] = []
    assert largest_that_fits([1, 2, 4, 8], lambda size: bool(tried.append(size)) or size <= 8) == 8
    assert largest_that_fits([1, 2, 4, 8], lambda size: bool(tried.append(size)) or size <= 4) == 4
    assert tried == [8, 8, 4]


@pytest.mark.parametrize(
    ("parallel", "sizes"),
    [
        ({}, [1, 2, 3, 4, 6, 12]),
        ({"pipeline": 2}, [1, 2, 3, 4, 6, 8, 12, 24]),
        # it needs at least twice as many micro-batches as ranks
        ({"pipeline": 2, "schedule": "dualpipev", "virtual_stages": 2}, [1, 2, 3, 4, 6]),
    ],
)
def test_sizes_divide_the_step_and_suit_the_schedule(parallel: dict[str, Any], sizes: list[int]) -> None:
    recipe = Recipe.model_validate({"batch": {"global_sequences": 24}, "parallel": parallel})
    assert legal_sizes(recipe, 2, "a test") == sizes


def test_a_size_beside_it_is_refused_and_null_takes_one_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, train__auto_micro_batch=True))
    assert main(["check", recipe]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.auto_micro_batch finds batch.micro_sequences, but batch.micro_sequences = 2 is given: remove one" in line
    assert main(["check", recipe, "--set", "batch.micro_sequences=null", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["values"]["batch.micro_sequences"]
    assert entry == {"value": 1, "origin": "default", "at_start": "the largest that fits"}


def test_what_was_found_has_its_origin(tmp_path: Path) -> None:
    resolved = load(write_recipe(tmp_path, train__auto_micro_batch=True, batch__micro_sequences=1)).with_micro_batch(4)
    assert resolved.recipe.batch.micro_sequences == 4
    assert resolved.as_resolved_json()["values"]["batch.micro_sequences"] == {"value": 4, "origin": "tried on the devices"}
    kept = Kept(4, {}, [(8, False), (4, True)])
    assert told(kept, found_now=True).endswith("(train.auto_micro_batch; tried: 8 does not, 4 fits)")
