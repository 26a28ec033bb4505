"""The pipeline's schedule at the recipe's door: each wrong combination refused in one line, its legal neighbours accepted."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from parallel.schedule_table import write_csv
from parallel.schedules import SCHEDULES, build
from trainer import recipe
from trainer.errors import RecipeError
from trainer.model.blocks import Block
from trainer.recipe import rules
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import check_micro_batches, schedule_table
from trainer.recipe.stages import layers_by_cost, stages_of


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


def load(
    parallel: dict[str, Any], batch: dict[str, Any] | None = None, layers: int = 12, **sections: Any
) -> recipe.ResolvedRecipe:
    value = {
        "model": {"family": "gpt2", "config": {"n_layer": layers}},
        "parallel": parallel,
        "batch": {"global_sequences": 16, **(batch or {})},
        **sections,
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
     ({"schedule": "gpipe"},), "parallel.schedule is used only with parallel.pipeline above 1, not 1: remove it",
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
    ("dualpipev needs two micro-batches for each rank",
     (pipeline(4, "dualpipev", 2), {"global_sequences": 8, "micro_sequences": 2}),
     "needs at least 2 · 4 micro-batches, one for each stage, but batch.global_sequences 8 / micro_sequences 2 = 4, and data "
     "parallelism divides it; nearest legal: batch.global_sequences 16",
     [(pipeline(4, "dualpipev", 2), {"global_sequences": 16, "micro_sequences": 2}),
      (pipeline(8), {"global_sequences": 8, "micro_sequences": 2})]),
    ("dualpipev fills its pipeline",
     (pipeline(4, "dualpipev", 2), {"global_sequences": 7}), "nearest legal: batch.global_sequences 8",
     [(pipeline(4, "dualpipev", 2), {"global_sequences": 8})]),
    ("each stage has a layer",
     (pipeline(4, "interleaved_1f1b", 2), {}, 7),
     "parallel.pipeline 4 × virtual_stages 2 = 8 stages, but the model has 7 layers, and each stage needs one; nearest legal "
     "parallel.pipeline: 3",
     [(pipeline(3, "interleaved_1f1b", 2), {"global_sequences": 12}, 7), (pipeline(4, "interleaved_1f1b", 2), {}, 8)]),
    ("a division by hand is for pipelines",
     ({"balance": [12]},), "parallel.balance is used only with parallel.pipeline above 1",
     [({**pipeline(2), "balance": [7, 5]},), ({"balance": None},)]),
    ("a division has the stages",
     ({**pipeline(2, "zbv", 2), "balance": [6, 6]},),
     "parallel.balance has 2 numbers, but parallel.pipeline 2 × virtual_stages 2 = 4 stages; legal: 4 numbers, the layers on "
     "each, or leave it out to divide by cost",
     [({**pipeline(2, "zbv", 2), "balance": [3, 3, 3, 3]},), (pipeline(2, "zbv", 2),)]),
    ("a division has the layers",
     ({**pipeline(3), "balance": [6, 4, 1]},),
     "parallel.balance = [6, 4, 1] is 11 layers, but the model has 12; nearest legal: [6, 4, 2], or leave it out",
     [({**pipeline(3), "balance": [6, 4, 2]},)]),
    ("a division has no more than the layers",
     ({**pipeline(2), "balance": [4096, 1]},), "but the model has 12; nearest legal: [11, 1], or leave it out",
     [({**pipeline(2), "balance": [11, 1]},)]),
    ("a division is levelled at once, however many layers are too many or missing",
     ({**pipeline(4), "balance": [4096, 1, 4095, 3]},), "but the model has 12; nearest legal: [4, 1, 4, 3], or leave it out",
     [({**pipeline(4), "balance": [4, 1, 4, 3]},)]),
    ("the first of the smallest stages get what is missing",
     ({**pipeline(4), "balance": [1, 5, 1, 2]},), "but the model has 12; nearest legal: [3, 5, 2, 2], or leave it out",
     [({**pipeline(4), "balance": [3, 5, 2, 2]},)]),
    ("a division leaves no stage empty",
     ({**pipeline(2), "balance": [12, 0]},), "parallel.balance[1] = 0: must be a whole number ≥ 1",
     [({**pipeline(2), "balance": [11, 1]},)]),
    ("a file exists",
     (pipeline(2, "tow.csv"),), 'parallel.schedule = "tow.csv": No such file or directory (looked from',
     [(pipeline(2, "two.csv"),), (pipeline(2, "./two.csv"),)]),
    ("a file is a file",
     (pipeline(2, "./"),), "a folder, not a file", [(pipeline(2, "two.csv"),)]),
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


def zero(stage: int, offload: str = "none") -> dict[str, Any]:
    return {"stage": stage, "offload_param": {"device": offload}}


@pytest.mark.parametrize(("name", "virtual_stages"), [("interleaved_zero_bubble", 1), ("zbv", 2), ("dualpipev", 2)])
def test_weights_that_are_divided_again_take_no_later_gradient(name: str, virtual_stages: int) -> None:
    other = "1f1b" if virtual_stages == 1 else "interleaved_1f1b"
    with pytest.raises(RecipeError) as error:
        load(pipeline(2, name, virtual_stages), zero=zero(3))
    (line,) = error.value.lines
    assert f'zero.stage = 3 divides a stage\'s weights again after its backward, but parallel.schedule "{name}"' in line
    assert line.endswith(f"nearest legal: zero.stage 2, or parallel.schedule {other}")
    load(pipeline(2, name, virtual_stages), zero=zero(2))
    load(pipeline(2, other, virtual_stages), zero=zero(3))


def test_offloaded_weights_cannot_have_a_lower_stage() -> None:
    with pytest.raises(RecipeError, match=r"nearest legal: parallel\.schedule interleaved_1f1b$"):
        load(pipeline(2, "zbv", 2), zero=zero(3, "cpu"))
    load(pipeline(2, "interleaved_1f1b", 2), zero=zero(3, "cpu"))


def test_a_file_is_judged_by_its_actions() -> None:
    with pytest.raises(RecipeError, match=r"nearest legal: zero\.stage 2, or a table with B in place of I and W"):
        load(pipeline(2, "v.csv", 2), zero=zero(3))
    load(pipeline(2, "v.csv", 2), zero=zero(2))
    load(pipeline(2, "two.csv"), zero=zero(3))


def test_layers_of_a_network_that_is_not_here_are_judged_when_it_is() -> None:
    parallel = {"pipeline": 2, "balance": [1, 2]}
    Path("r.json").write_text(json.dumps({"model": {"from_pretrained": "owner/name"}, "parallel": parallel}))
    resolved = recipe.load("r.json")
    assert resolved.recipe.parallel.schedule == "1f1b"
    fetched = {"model_type": "gpt2", "n_layer": 3}
    assert resolved.network(vocab_size=None, pretrained=fetched).num_layers == 3
    with pytest.raises(RecipeError, match=r"is 3 layers, but the model has 4; nearest legal: \[2, 2\]"):
        resolved.network(vocab_size=None, pretrained={**fetched, "n_layer": 4})
    with pytest.raises(RecipeError, match="2 stages, but the model has 1 layers"):
        resolved.network(vocab_size=None, pretrained={**fetched, "n_layer": 1})


def stages(resolved: recipe.ResolvedRecipe) -> list[list[Block]]:
    return stages_of(resolved.recipe, resolved.network(vocab_size=257))


def test_stages_hold_the_model_in_order() -> None:
    hand = stages(load({**pipeline(3), "balance": [7, 2, 3]}))
    assert [len(blocks) for blocks in hand] == [8, 2, 4]
    assert list(chain(*hand)) == [Block("embedding"), *(Block("layer", n) for n in range(12)), Block("head")]
    assert stages(load({})) == [list(chain(*hand))]


@pytest.mark.parametrize(("schedule", "layers"), [("interleaved_1f1b", [2, 1, 3, 1]), ("zbv", [1, 2, 3, 1])])
def test_stages_follow_the_ranks_of_the_schedule(schedule: str, layers: list[int], folder: Path) -> None:
    """A vocabulary of 50,257 on a small GPT-2: its head is as dear as five layers, so that its rank has few."""
    written = load(pipeline(2, schedule, 2), layers=sum(layers))
    network = written.network(vocab_size=50257)
    assert layers_by_cost(written.recipe, network) == layers
    write_csv(schedule_table(written.recipe, plan_of(written, 2)), folder / "same.csv")
    assert layers_by_cost(load(pipeline(2, "same.csv", 2), layers=sum(layers)).recipe, network) == layers


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("vocab_size", "ranks", "layers"),
    [
        # The head takes as long as 2.09 layers, the embedding as 0.05 of one.
        (128256, 4, [8, 9, 9, 6]),
        (128256, 8, [4, 4, 4, 4, 4, 5, 5, 2]),
        (32000, 4, [8, 8, 8, 8]),
    ],
)
def test_llama_8b(vocab_size: int, ranks: int, layers: list[int]) -> None:
    config = {**LLAMA_8B, "vocab_size": vocab_size}
    Path("r.json").write_text(
        json.dumps(
            {
                "model": {"family": "llama", "config": config},
                "data": {"seq_len": 8192},
                "parallel": pipeline(ranks),
                "batch": {"global_sequences": 32},
            }
        )
    )
    resolved = recipe.load("r.json")
    assert layers_by_cost(resolved.recipe, resolved.network(vocab_size=None)) == layers


def plan_of(resolved: recipe.ResolvedRecipe, world_size: int) -> BatchPlan:
    return BatchPlan.from_recipe(resolved.recipe, world_size, "here")


def test_a_world_too_large_for_the_schedule_is_refused_with_its_neighbours() -> None:
    resolved = load(pipeline(4, "dualpipev", 2))
    assert schedule_table(resolved.recipe, plan_of(resolved, 4)).num_micro_batches == 16
    with pytest.raises(RecipeError) as error:
        schedule_table(resolved.recipe, plan_of(resolved, 16))
    assert error.value.lines == [
        'parallel.schedule = "dualpipev" needs at least 2 · 4 micro-batches, one for each stage, but batch.global_sequences '
        "16 / (micro_sequences 1 × data-parallel 4) = 4; nearest legal: 8 micro-batches (batch.global_sequences 32)"
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
