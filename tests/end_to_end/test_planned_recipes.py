"""Recipes drawn at random, in many sizes and layouts: each is planned or refused in a clean line, and a search shows
nothing that `check` refuses.

All of them: `python -m tools.campaign.plans --cases 10000 --searched 300`
"""

from __future__ import annotations

import pytest

from tools.campaign.plans import Counts, campaign
from tools.campaign.recipe_supplies import Supplies


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Supplies:
    return Supplies(tmp_path_factory.mktemp("planned") / "supplies")


@pytest.mark.parametrize(("cases", "searched"), [(20, 2), pytest.param(10_000, 300, marks=pytest.mark.grid)])
@pytest.mark.timeout(7200)
def test_recipes_are_planned_and_searched(cases: int, searched: int, supplies: Supplies) -> None:
    counts = Counts()
    campaign(cases, searched, cases, supplies, counts)
    print(counts.facts())  # noqa: T201 - with -s: the longest plan and search
    assert counts.faults == []
    assert counts.totals["planned"] >= cases
