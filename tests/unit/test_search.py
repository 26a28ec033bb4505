"""The search of layouts: what it finds is legal by the recipe's own rules, nothing is better, and what it says of a layout
is what its plan says."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from parallel.schedules import SCHEDULES
from trainer.cli import main
from trainer.commands.network import known_network
from trainer.commands.ranks import divide
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import device
from trainer.planner.prediction import predict
from trainer.planner.search import find
from trainer.planner.search.choice import Choice, as_words
from trainer.planner.search.find import Search
from trainer.planner.search.near import neighbours
from trainer.planner.search.reasons import reason
from trainer.planner.search.remedies import remedies
from trainer.planner.search.space import admits
from trainer.planner.search.text import write_recipe
from trainer.planner.search.worlds import read_worlds, world
from trainer.recipe import ResolvedRecipe, load, load_changed

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "ds_configs"
LARGE = str(RECIPES / "llama_70b_3d.json")
MIDDLE = str(RECIPES / "llama_8b_tensor.json")
ON = device("h100-80g")
SMALL: dict[str, Any] = {
    "model": {"family": "llama", "config": {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
                                            "intermediate_size": 5504, "max_position_embeddings": 1024}},
    "data": {"seq_len": 1024},
    "batch": {"global_sequences": 8, "micro_sequences": 2},
    "precision": {"dtype": "bf16"},
    "train": {"steps": 10},
}  # fmt: skip


def searched(recipe: str | Path, gpus: int, *settings: str, on: str = "h100-80g") -> Search:
    resolved = load(recipe, settings)
    return Search(resolved, network_of(resolved), gpus, device(on))


def network_of(resolved: ResolvedRecipe) -> TransformerConfig:
    network = known_network(resolved)
    assert network is not None
    return network


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


@cache
def large() -> Search:
    return searched(MIDDLE, 16)


def checked(recipe: str | Path, settings: list[str], gpus: int) -> ResolvedRecipe:
    """The recipe as `check --world-size` accepts it; RecipeError else."""
    resolved = load(recipe, settings)
    divide(resolved.recipe, network_of(resolved), gpus, "--world-size")
    return resolved


# ---------------------------------------------------------------------------- nothing better, nothing refused


def legal_settings(recipe: Path, gpus: int, number: int) -> Iterator[tuple[list[str], ResolvedRecipe]]:
    """Settings that `check` accepts, drawn from all combinations of values, without the search's own enumeration."""
    values = {
        "parallel.tensor": (1, 2, 4),
        "parallel.pipeline": (1, 2, 4),
        "parallel.schedule": (*SCHEDULES,),
        "parallel.virtual_stages": (1, 2),
        "parallel.sequence_parallel": ("true", "false"),
        "zero.stage": (0, 1, 2, 3),
        "zero.offload_optimizer.device": ("none", "cpu"),
        "zero.offload_param.device": ("none", "cpu"),
        "train.recompute": ("none", "selective", "full"),
        "batch.micro_sequences": (1, 2, 4, 8),
    }
    every = [*product(*values.values())]
    random.Random(0).shuffle(every)
    for chosen in every[:number]:
        settings = [f"{key}={value}" for key, value in zip(values, chosen, strict=True)]
        try:
            yield settings, checked(recipe, settings, gpus)
        except RecipeError:
            continue


def test_nothing_is_better_that_check_accepts(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search plans a part of the space; no layout of a sample of all combinations is faster and fits."""
    monkeypatch.setattr(find, "WHOLE", 0)
    search = searched(small, 4)
    assert search.best is not None
    seen = 0
    for settings, resolved in legal_settings(small, 4, 1500):
        prediction = predict(resolved.recipe, search.network, 4, ON)
        assert prediction.time is not None
        assert not prediction.fits or prediction.time.total >= search.best.seconds * (1 - 1e-9), settings
        seen += 1
    assert seen > 50


def test_the_best_of_a_small_space_is_the_best_of_all(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "WHOLE", 0)
    search = searched(small, 2, "batch.global_sequences=2", "model.config.num_hidden_layers=2")
    every = [choice for choice in search.space if admits(search.space, choice)]
    plans = [predict(choice.recipe(search.space.base), search.network, 2, ON) for choice in every]
    assert 100 < len(every) < 1000
    assert search.best is not None
    assert search.best.seconds == min(plan.time.total for plan in plans if plan.fits and plan.time)


def test_what_check_accepts_is_in_the_space(small: Path) -> None:
    """But for what is the same training under another name, and unequal numbers of layers on stages."""
    search = searched(small, 4)
    space = {*search.space}
    for _, resolved in legal_settings(small, 4, 1500):
        choice = Choice.of(resolved.recipe)
        same_as_another = choice.schedule in ("interleaved_1f1b", "looped_bfs") and choice.virtual_stages == 1
        assert choice in space or same_as_another, choice


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("llama_70b_3d", 64), ("zero3_nvme_infinity", 8), ("bert_classify", 4), ("translate_en_de", 8), ("v100_fp16", 8)],
)
def test_a_layout_of_the_space_is_what_its_settings_say(name: str, gpus: int) -> None:
    recipe = RECIPES / f"{name}.json"
    search = searched(recipe, gpus)
    every = [*search.space]
    assert len(every) > 100
    for choice in random.Random(0).sample(every, 25):
        resolved = checked(recipe, choice.settings(search.resolved), gpus)
        assert Choice.of(resolved.recipe) == choice
        planned, written = choice.recipe(search.space.base), resolved.recipe
        assert (planned.parallel, planned.zero, planned.batch, planned.train) == (
            written.parallel.model_copy(update={"overlap": planned.parallel.overlap}),
            written.zero,
            written.batch,
            written.train,
        )


def test_a_micro_batch_that_is_chosen_is_not_searched_again(small: Path) -> None:
    small.write_text(json.dumps({**SMALL, "batch": {"global_sequences": 8}, "train": {"steps": 10, "auto_micro_batch": True}}))
    search = searched(small, 2)
    assert search.best is not None
    for one in (search.best, *search.front):
        resolved = checked(small, one.choice.settings(search.resolved), 2)
        assert resolved.recipe.train.auto_micro_batch == (one.choice.micro_sequences == 1)


def test_a_layout_is_left_for_one_that_needs_fewer_keys() -> None:
    """What a recipe wrote for its own layout is taken back where nothing would read it."""
    resolved = load(
        LARGE,
        [
            *("zero.stage=3", "zero.offload_optimizer.device=nvme", "zero.offload_optimizer.nvme_path=/tmp/nvme"),
            *("zero.offload_optimizer.buffer_count=8", "zero.offload_optimizer.pipeline_read=true"),
            *("parallel.overlap=true", "parallel.sequence_parallel=true", f"parallel.balance={[4] * 20}"),
        ],
    )
    plain = Choice(micro_sequences=4)
    found = load_changed(resolved, plain.settings(resolved)).recipe
    assert Choice.of(found) == plain
    assert (found.zero.offload_optimizer.nvme_path, found.parallel.balance) == (None, None)


# ---------------------------------------------------------------------------- what is said of layouts


def test_the_reasons_sum_to_the_difference() -> None:
    search = large()
    assert search.best is not None
    assert {one.key for one in search.neighbours} >= {"tensor", "pipeline", "zero_stage", "recompute"}
    for one in search.neighbours:
        assert sum(one.reason.parts.values()) == pytest.approx(one.reason.slower, abs=1e-9)
        assert one.reason.slower == pytest.approx(one.planned.seconds / search.best.seconds - 1)
        assert one.planned.prediction.fits is not False or one.reason.text.startswith("does not fit: ")
    assert sum(search.best.time.parts.values()) == pytest.approx(search.best.seconds)


def test_no_neighbour_is_better() -> None:
    search = large()
    assert search.best is not None
    assert all(search.best.order <= one.planned.order for one in search.neighbours)


def test_neighbours_differ_in_one_key_and_what_goes_along() -> None:
    search = large()
    assert search.best is not None
    for key, ones in neighbours(search.space, search.best.choice).items():
        for one in ones:
            assert key in one.changed
            assert {*one.choice.differing(search.best.choice)} == {*one.changed}


def test_a_tensor_group_that_crosses_the_node_is_said() -> None:
    search = searched(LARGE, 64, "parallel.tensor=8", "parallel.pipeline=4")
    inside, across = (search.plan(Choice(tensor=t, pipeline=4, divides_tokens=True, zero_stage=1)) for t in (8, 16))
    assert inside is not None
    assert across is not None
    slower = reason(inside, across)
    assert slower.parts["tensor sums"] > 0.5 * slower.slower > 0
    assert "tensor sums across nodes +" in slower.text or slower.text.startswith("does not fit")


def test_none_of_the_front_is_beaten() -> None:
    search = large()
    sizes = [(one.seconds, one.num_bytes) for one in search.front]
    assert sizes == sorted(sizes)
    assert [size for _, size in sizes] == sorted((size for _, size in sizes), reverse=True)
    for one in search.planned:
        assert any(one.seconds >= seconds and one.num_bytes >= size for seconds, size in sizes) or one.seconds > 2 * sizes[0][0]


def test_rough_figures_are_near_the_plans() -> None:
    """They only choose what is planned; the plans decide."""
    search = large()
    errors = []
    for one in random.Random(1).sample(search.rough, 60):
        planned = search.plan(one.choice)
        assert planned is not None
        errors.append((abs(one.seconds / planned.seconds - 1), abs(one.num_bytes / planned.num_bytes - 1)))
    assert mean(time for time, _ in errors) < 0.03
    assert mean(size for _, size in errors) < 0.1


# ---------------------------------------------------------------------------- the command


def told(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_s_layouts_load_and_its_recipe_too(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deeper" / "best.json"
    out.parent.mkdir()
    words = [str(small), "--gpus", "8", "--device", "h100-80g", "--search", "--set", "run.name=mine"]
    found = told([*words, "--out", str(out)], capsys)
    best = found["best"]
    for one in (best, *found["ranked"], *found["neighbours"], *found["front"]):
        resolved = checked(small, one["settings"], 8)
        prediction = predict(resolved.recipe, network_of(resolved), 8, ON)
        assert prediction.device_bytes == one["device_bytes"]
        assert prediction.time is not None
        assert prediction.time.total == pytest.approx(one["step_s"])
    written = load(out)
    assert written.recipe == load(small, ["run.name=mine", *best["settings"]]).recipe
    assert json.loads(out.read_text())["extends"] == "../small.json"
    assert shlex.split(found["command"])[:2] == ["triaxis", "check"]
    assert main(shlex.split(found["command"])[1:]) == 0
    assert main(["check", str(out), "--world-size", "8"]) == 0
    capsys.readouterr()
    assert main(["plan", *words, "--out", str(out)]) == 78
    assert "something is there already, and is not overwritten" in capsys.readouterr().err


def test_a_recipe_keeps_lists_of_the_command_line(small: Path, tmp_path: Path) -> None:
    recipe = {**SMALL, "data": {"seq_len": 1024, "sources": [{"path": "stdlib"}, {"path": str(small)}]}}
    small.write_text(json.dumps(recipe))
    overrides, settings = ["data.sources[1].weight=2", "optimizer.betas[1]=0.99", 'zero={"stage": 1}'], ["zero.stage=2"]
    out = tmp_path / "best.json"
    write_recipe(out, small, overrides, settings)
    assert load(out).recipe == load(small, [*overrides, *settings]).recipe
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_settings_are_words_of_a_shell() -> None:
    settings = ["zero.stage=2", 'data.sources=[{"path": "it\'s"}]']
    assert [word for word in shlex.split(as_words(settings)) if word != "--set"] == settings


def test_tables_fit_a_narrow_terminal(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.commands.output.DEFAULT_COLUMNS", 60)
    assert main(["plan", str(small), "--gpus", "4", "--device", "h100-80g", "--search"]) == 0
    *tables, command = capsys.readouterr().out.rstrip().splitlines()
    assert command.startswith("triaxis check ")
    assert all(len(line.rstrip()) <= 60 for line in tables if line.startswith(" ") or "step [s]" in line)


def test_numbers_of_gpus() -> None:
    assert read_worlds("8") == [8]
    assert read_worlds("24..27") == [24, 25, 26, 27]
    assert read_worlds("32, 8,16..17") == [8, 16, 17, 32]


@pytest.mark.parametrize("text", ["", "0", "8..4", "1..100000", "8,", "x", "-1", "1e3", "8...9", "9999999", "٣"])
def test_what_is_no_number_of_gpus_is_one_line(text: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), f"--gpus={text}"]) == 78
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--gpus" in line


def test_a_range_says_what_each_number_costs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told([str(small), "--gpus", "3..5,8", "--device", "h100-80g"], capsys)
    worlds = {one["gpus"]: one for one in found["worlds"]}
    assert [*worlds] == [3, 4, 5, 8]
    assert worlds[5]["best"] is None
    assert "no layout divides it" in worlds[5]["why_none"]
    four = worlds[4]
    hours = 4 * four["best"]["step_s"] / (8 * 1024) * 1e9 / 3600
    assert four["device_hours_per_billion_tokens"] == pytest.approx(hours)
    assert main(["plan", str(small), "--gpus", "3..5", "--device", "h100-80g"]) == 0
    assert "no layout divides it" in capsys.readouterr().out


def test_without_a_number_nodes_are_doubled_until_it_does_not_pay(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told([str(small), "--device", "h100-80g", "--search"], capsys)["worlds"]
    sizes = [one["gpus"] for one in found]
    assert sizes == [8 * 2**n for n in range(len(sizes))]
    each = [one["tokens_per_s_each"] or 0.0 for one in found]
    assert each[-1] < 0.5 * max(each)
    assert all(rate >= 0.5 * max(each[: place + 1]) for place, rate in enumerate(each[:-1]))


def test_why_nothing_fits() -> None:
    resolved = load(RECIPES / "llama_405b_pretrain_3d.json")
    found = world(resolved, network_of(resolved), 2, device("rtx4090"))
    assert found.best is None
    assert found.why.startswith("does not fit: the smallest layout needs ")
    assert world(resolved, network_of(resolved), 10007, ON).why.startswith("no layout divides it")


def test_what_does_not_fit_gets_changes_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    full = "batch.micro_sequences=4"
    resolved = load(MIDDLE, [full])
    network = network_of(resolved)
    prediction = predict(resolved.recipe, network, 8, device("rtx4090"))
    assert prediction.time is not None
    found = remedies(resolved, network, prediction)
    assert len(found) == 3
    for one in found:
        changed = checked(MIDDLE, [full, *one.settings], 8)
        again = predict(changed.recipe, network, 8, device("rtx4090"))
        assert again.fits
        assert again.time is not None
        assert again.time.total / prediction.time.total - 1 == pytest.approx(one.slower)
    assert [one.slower for one in found] == sorted(one.slower for one in found)
    assert main(["plan", MIDDLE, "--gpus", "8", "--device", "rtx4090", "--set", full]) == 78
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("would fit: --set ")] == [f"would fit: {one.line}" for one in found]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--search"], "layouts are compared on a device: give --device NAME"),
        (["--gpus", "8..9"], "layouts are compared on a device: give --device NAME"),
        (["--search", "--device", "v100-32g", "--gpus", "8"], "v100-32g has no products in it; legal: fp16, fp32"),
        (["--search", "--device", "h100-80g", "--gpus", "7"], "--gpus 7: no layout divides it"),
        (["--device", "h100-80g", "--gpus", "4", "--out", "x.json"], "--out FILE takes the best layout for one number"),
        (["--device", "h100-80g", "--search", "--out", "x.json"], "--out FILE takes the best layout for one number"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    words: list[str], says: str, small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(small.parent))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["plan", str(small), *words]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_model_of_transformers_has_no_plan(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text(
        json.dumps({"model": {"family": "auto", "config": {"model_type": "bloom", "hidden_size": 16, "n_head": 2}}})
    )
    assert main(["plan", str(small), "--search", "--device", "h100-80g", "--gpus", "2"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert 'model.family "auto" has no plan' in line


@pytest.mark.parametrize("name", ["qwen3_dpo", "llama3_8b_qlora", "translate_en_de", "bert_classify"])
def test_other_tasks_and_tuning_are_searched(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = load(RECIPES / f"{name}.json")
    if known_network(resolved) is None:
        assert main(["plan", str(RECIPES / f"{name}.json"), "--gpus", "8", "--device", "h100-80g", "--search"]) == 78
        assert "its network is not known before the tokenizer or the hub is opened" in capsys.readouterr().err
        return
    search = Search(resolved, network_of(resolved), 8, ON)
    assert search.best is not None
    assert admits(search.space, search.best.choice)
