"""The pipeline's schedule at the recipe's door: each wrong combination refused in one line, its legal neighbours accepted."""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.schedule_table import write_csv
from parallel.schedules import SCHEDULES, build
from trainer import recipe
from trainer.batching import BatchPlan
from trainer.errors import RecipeError
from trainer.recipe import rules
from trainer.recipe.pipeline import check_micro_batches, schedule_table


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with schedules in files; and a door that lets pipelines through, as it will once they train."""
    monkeypatch.setattr(rules, "SINGLE_DEGREE", (), raising=False)
    monkeypatch.chdir(tmp_path)
    write_csv(build("1f1b", ranks=2, virtual_stages=1, num_micro_batches=4), tmp_path / "two.csv")
    write_csv(build("zbv", ranks=2, virtual_stages=2, num_micro_batches=4), tmp_path / "v.csv")
    (tmp_path / "stuck.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    (tmp_path / "typo.csv").write_text("0F0,0B0\n1F0,1BO\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe")
    return tmp_path


def load(parallel: dict[str, Any], batch: dict[str, Any] | None = None, layers: int = 12) -> recipe.ResolvedRecipe:
    value = {
        "model": {"family": "gpt2", "config": {"n_layer": layers}},
        "parallel": parallel,
        "batch": {"global_sequences": 16, **(batch or {})},
    }
    Path("r.json").write_text(json.dumps(value))
    return recipe.load("r.json")


def pipeline(ranks: int, schedule: str = "1f1b", virtual_stages: int = 1) -> dict[str, Any]:
    return {"pipeline": ranks, "schedule": schedule, "virtual_stages": virtual_stages}


Arguments = tuple[Any, ...]  # of load
# (name, refused, what the line holds, the neighbours that it names)
RULES: list[tuple[str, Arguments, str, list[Arguments]]] = [
    ("a schedule is one of those",
     (pipeline(2, "1fb1"),), 'parallel.schedule = "1fb1": unknown schedule; did you mean 1f1b?; legal: gpipe, 1f1b',
     [(pipeline(2, name, SCHEDULES[name].virtual_stages or 1),) for name in SCHEDULES]),
    ("far from any schedule",
     (pipeline(2, "chimera"),), "unknown schedule; legal: gpipe",
     [(pipeline(2),)]),
    ("a schedule is for pipelines",
     ({"schedule": "gpipe"},), "parallel.schedule is used only with parallel.pipeline above 1: remove it",
     [({"schedule": "gpipe", "pipeline": 2},), ({},)]),
    ("virtual stages are for pipelines",
     ({"virtual_stages": 2},), "parallel.virtual_stages is used only with parallel.pipeline above 1",
     [(pipeline(2, "looped_bfs", 2),), ({},)]),
    ("1f1b has one stage per rank",
     (pipeline(2, "1f1b", 2),),
     'virtual_stages = 2, but parallel.schedule "1f1b" has 1 on each rank; legal: parallel.virtual_stages 1, or '
     "parallel.schedule interleaved_1f1b, looped_bfs, interleaved_zero_bubble, zbv, dualpipev",
     [(pipeline(2),), *((pipeline(2, name, 2),) for name in SCHEDULES if name not in ("1f1b", "gpipe"))]),
    ("a V has two",
     (pipeline(2, "zbv"),), 'parallel.schedule "zbv" has 2 on each rank; legal: parallel.virtual_stages 2, or',
     [(pipeline(2, "zbv", 2),), (pipeline(2, "interleaved_zero_bubble"),)]),
    ("1f1b fills its pipeline",
     (pipeline(8), {"global_sequences": 8, "micro_sequences": 2}),
     "needs at least 8 micro-batches, one for each stage, but batch.global_sequences 8 / micro_sequences 2 = 4, and data "
     "parallelism divides it; nearest legal: batch.global_sequences 16",
     [(pipeline(8), {"global_sequences": 16, "micro_sequences": 2}), (pipeline(8, "gpipe"), {"global_sequences": 8})]),
    ("dualpipev fills its pipeline",
     (pipeline(4, "dualpipev", 2), {"global_sequences": 7}), "nearest legal: batch.global_sequences 8",
     [(pipeline(4, "dualpipev", 2), {"global_sequences": 8})]),
    ("each stage has a layer",
     (pipeline(4, "interleaved_1f1b", 2), {}, 7),
     "parallel.pipeline 4 × virtual_stages 2 = 8 stages, but the model has 7 layers, and each stage needs one; nearest legal "
     "parallel.pipeline: 3",
     [(pipeline(3, "interleaved_1f1b", 2), {"global_sequences": 12}, 7), (pipeline(4, "interleaved_1f1b", 2), {}, 8)]),
    ("a file exists",
     (pipeline(2, "tow.csv"),), 'parallel.schedule = "tow.csv": No such file or directory (looked from',
     [(pipeline(2, "two.csv"),), (pipeline(2, "./two.csv"),)]),
    ("a file is a file",
     (pipeline(2, "./"),), "Is a directory", [(pipeline(2, "two.csv"),)]),
    ("a file is text",
     (pipeline(2, "binary.csv"),), "can't decode", [(pipeline(2, "two.csv"),)]),
    ("a file holds actions",
     (pipeline(2, "typo.csv"),), 'parallel.schedule = "typo.csv": row 2, column 2: \'1BO\' is not an action',
     [(pipeline(2, "two.csv"),)]),
    ("a file has a row per rank",
     (pipeline(4, "two.csv"),), "2 rows (ranks), but parallel.pipeline = 4", [(pipeline(2, "two.csv"),)]),
    ("a file has the stages",
     (pipeline(2, "v.csv"),), "rank 0 has 2 stages, but parallel.virtual_stages = 1", [(pipeline(2, "v.csv", 2),)]),
    ("a file has its micro-batches",
     (pipeline(2, "two.csv"), {"global_sequences": 8, "micro_sequences": 4}),
     "4 micro-batches of batch.micro_sequences 4, but batch.global_sequences = 8 is not a multiple of 16",
     [(pipeline(2, "two.csv"), {"global_sequences": 8, "micro_sequences": 2})]),
    ("a file does not deadlock",
     (pipeline(2, "stuck.csv"),), '"stuck.csv": deadlock: rank 0 waits at 0B0 for 1B0, which rank 1 runs after 1F1; rank 1',
     [(pipeline(2, "two.csv"),)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "refused", "said", "neighbours"), RULES, ids=[rule[0] for rule in RULES])
def test_rule(name: str, refused: Arguments, said: str, neighbours: list[Arguments]) -> None:
    with pytest.raises(RecipeError) as error:
        load(*refused)
    assert len(error.value.lines) == 1, error.value.lines
    assert said in error.value.lines[0]
    for neighbour in neighbours:
        load(*neighbour)


def test_layers_of_a_network_that_is_not_here_are_not_judged() -> None:
    Path("r.json").write_text(json.dumps({"model": {"from_pretrained": "owner/name"}, "parallel": {"pipeline": 2}}))
    assert recipe.load("r.json").recipe.parallel.schedule == "1f1b"


def plan_of(resolved: recipe.ResolvedRecipe, world_size: int) -> BatchPlan:
    return BatchPlan.from_recipe(resolved.recipe, world_size, "here")


def test_a_world_too_large_for_the_schedule_is_refused_with_its_neighbours() -> None:
    resolved = load(pipeline(8, "1f1b"))
    assert schedule_table(resolved.recipe, plan_of(resolved, 8)).num_micro_batches == 16
    with pytest.raises(RecipeError) as error:
        schedule_table(resolved.recipe, plan_of(resolved, 32))
    assert error.value.lines == [
        'parallel.schedule = "1f1b" needs at least 8 micro-batches, one for each stage, but batch.global_sequences 16 / '
        "(micro_sequences 1 × data-parallel 4) = 4; nearest legal: 8 micro-batches (batch.global_sequences 32)"
    ]


def test_rounds_are_equal_and_both_neighbours_named() -> None:
    resolved = load(pipeline(4, "interleaved_1f1b", 2), {"global_sequences": 14})
    with pytest.raises(RecipeError, match=r"nearest legal: 12 or 15 micro-batches \(batch.global_sequences 12 or 15\)"):
        check_micro_batches(resolved.recipe, plan_of(resolved, 4))
    check_micro_batches(resolved.recipe, plan_of(resolved, 8))  # 7, in one round


def test_a_file_has_one_number_of_micro_batches() -> None:
    resolved = load(pipeline(2, "two.csv"))
    assert schedule_table(resolved.recipe, plan_of(resolved, 8)).num_micro_batches == 4
    with pytest.raises(RecipeError, match=r"is written for 4 micro-batches, but .* = 16; nearest legal: 4 micro-batches"):
        schedule_table(resolved.recipe, plan_of(resolved, 2))


def test_without_a_pipeline_any_number_will_do() -> None:
    resolved = load({})
    check_micro_batches(resolved.recipe, plan_of(resolved, 16))
