"""What `check` accepts starts: recipes drawn at random from the schema, each run for its one or two steps.

More of them: `python -m tools.campaign.recipes --cases 300 --seed 1`
"""

from __future__ import annotations

import pytest

from tools.campaign.recipe_draw import draw, drawn_keys
from tools.campaign.recipe_supplies import Supplies
from tools.campaign.recipes import one_case
from trainer.recipe import known_keys

SEED = 0
EVERY_DAY = range(10)
GRID = range(10, 300)


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Supplies:
    return Supplies(tmp_path_factory.mktemp("drawn") / "supplies")


@pytest.mark.parametrize("number", [*EVERY_DAY, *(pytest.param(number, marks=pytest.mark.grid) for number in GRID)])
def test_a_recipe_that_check_accepts_starts(number: int, supplies: Supplies) -> None:
    outcome = one_case(SEED, number, supplies, supplies.folder.parent / str(number))
    assert outcome["passed"], outcome


def test_the_same_case_is_the_same_recipe(supplies: Supplies) -> None:
    assert draw(SEED, 3, supplies) == draw(SEED, 3, supplies)


def test_every_key_of_the_schema_is_drawn() -> None:
    """But sections, and what a recipe begins with: its network, its sources, the file that it extends."""
    sections = {key.rpartition(".")[0].removesuffix("[0]") for key in known_keys()} - {""}
    begun_with = {"extends", "model.config", "data.sources", "data.eval_sources", "data.task"}
    begun_with |= {key for key in known_keys() if key.rpartition(".")[2] in ("path", "target_path", "columns", "shape")}
    begun_with |= {key for key in known_keys() if ".fields." in key} | {"model.from_pretrained"}
    assert {key.replace("[0]", "[]") for key in {*known_keys()} - sections - begun_with} <= drawn_keys()
