"""A run as long as so many passes, as a user meets it: its first start, more of it, and less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import WAYS, Way, arguments, numbers, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train

ONE = WAYS[0]
ZERO1 = next(way for way in WAYS if way.name == "dp2-zero1")


def run(recipe: Path, run_dir: Path, *keys: str, way: Way = ONE) -> Ended:
    command = arguments(recipe, run_dir, way, *keys)
    return run_ranks(train, command, world_size=way.processes, log=run_dir.parent / "log")


def said(recipe: Path, run_dir: Path, *keys: str, way: Way = ONE) -> str:
    ended = run(recipe, run_dir, *keys, way=way)
    assert ended.codes == (0,) * way.processes, ended.said
    return ended.said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pass is 44 sequences of 32 tokens: 5.5 steps of 8."""
    folder = tmp_path_factory.mktemp("epochs")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n:031d}"}) + "\n" for n in range(44)))
    data = {"sources": [{"path": str(folder / "rows.jsonl")}]}
    path = write_recipe(folder, steps=1, every=4, keep=9, data=data, schedule={"name": "constant"})
    given = json.loads(path.read_text())
    del given["train"]["steps"]
    given["train"]["epochs"] = 1
    path.write_text(json.dumps(given))
    return path


def value_of(run_dir: Path, key: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run_dir / "resolved.json").read_text())["values"][key]
    return entry


def test_a_run_of_one_epoch_goes_on_to_two(recipe: Path, tmp_path: Path) -> None:
    """As one run of two epochs, to the bit, where the learning rate does not depend on the length."""
    run_dir, at_once = tmp_path / "run", tmp_path / "at-once"
    assert said(recipe, run_dir).count("6 steps (train.epochs 1) = 1.09 passes over 44 sequences") == 1
    assert value_of(run_dir, "train.steps") == {"value": 6, "origin": "derived"}
    assert value_of(run_dir, "train.epochs") == {"value": 1.0, "origin": f"file {recipe}"}
    assert "has reached step 6 of 6: nothing to do; to go on, raise train.epochs" in said(recipe, run_dir)
    assert (
        "train.epochs 1 → 2: train.steps 6 → 11: constant does not depend on it; the learning rate at step 7 is 0.003, as by "
        "the earlier plan"
    ) in said(recipe, run_dir, "train.epochs=2")
    assert value_of(run_dir, "train.steps") == {"value": 11, "origin": "derived"}
    said(recipe, at_once, "train.epochs=2")
    assert numbers(run_dir) == numbers(at_once)
    assert [step for step, *_ in numbers(run_dir)] == list(range(1, 12))


def test_two_ranks_take_as_many_steps(recipe: Path, tmp_path: Path) -> None:
    text = said(recipe, tmp_path / "run", way=ZERO1)
    assert text.count("6 steps (train.epochs 1) = 1.09 passes over 44 sequences") == 1, "by the first rank"
    assert value_of(tmp_path / "run", "train.steps")["value"] == 6
    assert [step for step, *_ in numbers(tmp_path / "run")] == list(range(1, 7))


def test_steps_and_epochs_follow_each_other(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert "4 steps = 0.727 passes over 44 sequences" in said(
        recipe, run_dir, "train.epochs=null", "train.steps=4", "schedule.name=cosine"
    )
    more = said(recipe, run_dir, "train.epochs=1.5", "schedule.name=cosine")
    assert "train.epochs none → 1.5: train.steps 4 → 9: the cosine now ends at step 9; the learning rate at step 5 is" in more
    assert "by the earlier plan" in more
    shorter = said(recipe, run_dir, "train.epochs=0.7", "schedule.name=cosine")
    assert "the cosine now ends at step 4; no step is left of it" in shorter
    assert [step for step, *_ in numbers(run_dir)] == list(range(1, 10)), "what was trained stays"


def test_other_data_is_seen_although_the_epochs_are_the_same(recipe: Path, tmp_path: Path) -> None:
    said(recipe, tmp_path / "run")
    more = recipe.parent / "more.jsonl"
    more.write_text((recipe.parent / "rows.jsonl").read_text() + json.dumps({"text": "x" * 200}) + "\n")
    changed = f"data.sources[0].path={more}"
    command = [*arguments(recipe, tmp_path / "run", ONE, changed), "--allow-change", "data"]
    ended = run_ranks(train, command, world_size=1, log=tmp_path / "log")
    assert ended.codes == (0,), ended.said
    assert "train.steps 6 → 7" in ended.said
