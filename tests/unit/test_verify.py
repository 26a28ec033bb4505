"""What `triaxis verify` does around its ranks: names of layouts, the twin's sizes, the verdict, the table, the processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from parallel.topology import Layout
from trainer.errors import EXIT_HANG, EXIT_INTERNAL, RecipeError
from trainer.recipe import load
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import check_micro_batches
from trainer.verify.command import Report, Row
from trainer.verify.compare import Comparison, Outcome, compare, number_difference, tensor_differences
from trainer.verify.job import RankResult
from trainer.verify.layouts import ONE_PROCESS, NamedLayout, parse, recipe_in, up_to
from trainer.verify.processes import LayoutFailed, run_ranks
from trainer.verify.table import table
from trainer.verify.twin import Twin, full_size, network_of, scaled_down

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tp2", NamedLayout(Layout(tp=2))),
        ("dp2xtp4", NamedLayout(Layout(dp=2, tp=4))),
        ("pp2xdp2", NamedLayout(Layout(pp=2, dp=2))),
        ("tp2xdp1", NamedLayout(Layout(tp=2))),
        ("tp2-sp", NamedLayout(Layout(tp=2), sequence=False)),
        ("tp2-sp+compile", NamedLayout(Layout(tp=2), sequence=False, compiles=True)),
        ("compile", NamedLayout(Layout(), compiles=True)),
        ("tp2xdp2+sp", NamedLayout(Layout(tp=2, dp=2), sequence=True)),
    ],
)
def test_a_name_is_read(name: str, expected: NamedLayout) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "tp", "2", "tp2x", "xtp2", "tp2 xdp2", "tp2xtp2", "xp2", "tp0", "tp-2", "TP2", "tp2sp", "tp2+sp-sp", "dp1", "dp2+sp"],
)
def test_what_is_no_layout_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(RecipeError, match=r"--layouts .*(tp2|legal)"):
        parse(name)


degrees = st.integers(1, 8)
layouts = st.builds(Layout, pp=degrees, dp=degrees, cp=degrees, tp=degrees)


@given(layouts.filter(lambda layout: layout.world_size > 1), st.sampled_from([None, True, False]))
def test_every_layout_is_read_as_it_is_written(layout: Layout, sequence: bool | None) -> None:
    named = NamedLayout(layout, sequence if layout.tp > 1 else None)
    assert parse(str(named)) == named


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_the_default_layouts_fit_and_are_each_once(processes: int) -> None:
    named = up_to(processes, sequence=True)
    assert len(set(named)) == len(named)
    assert all(1 < each.layout.world_size <= processes for each in named)
    names = {str(each) for each in named}
    assert {"tp2", "dp2", "pp2", "tp2-sp"} <= names or processes == 1
    assert ({"tp4", "dp4", "tp2xdp2", "pp2xdp2", "pp2xtp2"} <= names) == (processes >= 4)
    assert ("pp2xtp2xdp2" in names) == (processes == 8)


def test_a_recipe_in_a_layout_has_no_key_that_nothing_reads_there() -> None:
    written = {"parallel": {"tensor": 8, "sequence_parallel": True, "overlap": False, "pipeline": 4, "schedule": "gpipe"}}
    assert recipe_in(written, parse("dp2"))["parallel"] == {"tensor": 1, "pipeline": 1, "context": 1}
    tensor = recipe_in(written, parse("tp2-sp"))["parallel"]
    assert tensor == {"tensor": 2, "pipeline": 1, "context": 1, "sequence_parallel": False, "overlap": False}
    assert recipe_in(written, parse("pp2"))["parallel"] == {"tensor": 1, "pipeline": 2, "context": 1, "schedule": "gpipe"}
    assert written["parallel"]["tensor"] == 8


# --------------------------------------------------------------------------------------------------------------- twin


def passes_the_door(written: dict[str, Any], named: NamedLayout) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(recipe_in(written, named)))
        try:
            recipe = load(path).recipe
            check_micro_batches(recipe, BatchPlan.from_recipe(recipe, named.layout.world_size, "the test"))
        except RecipeError:
            return False
        return True


def resolve(written: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(written))
        return load(path)


def in_layout(twin: Twin, named: NamedLayout) -> Any:
    return network_of(resolve(recipe_in(twin.given, named)))


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Any family, any heads, with or without windows and a head size of its own."""
    family = draw(st.sampled_from(["gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"]))
    kv_heads, ratio = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    heads, layers = kv_heads * ratio, draw(st.integers(1, 6))
    sizes = {"hidden_size": heads * 16, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 1000}
    if family == "gpt2":
        config = {**sizes, "n_positions": 512, "n_inner": draw(st.sampled_from([None, 48 * heads]))}
    else:
        config = {**sizes, "num_key_value_heads": kv_heads, "intermediate_size": 24 * draw(st.integers(1, 9))}
        config["max_position_embeddings"] = 512
    if family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 6))}
    return {
        "model": {"family": family, "config": config},
        "data": {"seq_len": 512},
        "batch": {"global_sequences": 48, "micro_sequences": draw(st.sampled_from([1, 2, 4]))},
        "zero": {"stage": draw(st.integers(0, 3))},
    }


@given(recipes(), st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3), st.sampled_from([1, 2, 3, 4]))
def test_the_twin_divides_wherever_the_recipe_does(written: dict[str, Any], tensor: list[int], dp: int) -> None:
    named = [NamedLayout(Layout(tp=tp, dp=dp)) for tp in tensor]
    named = [ONE_PROCESS, *(each for each in named if passes_the_door({**written, "batch": {}, "data": {"seq_len": 48}}, each))]
    resolved = resolve(written)
    twin = scaled_down(resolved, [each.layout for each in named])
    own, small = network_of(resolved), in_layout(twin, ONE_PROCESS)
    assert all(passes_the_door(twin.given, each) for each in named)
    assert small.num_heads * own.num_kv_heads == own.num_heads * small.num_kv_heads
    assert small.num_layers == min(2, own.num_layers)
    assert [math.gcd(small.vocab_size, each.layout.tp) for each in named] == [1] * len(named)
    for each in named:
        assert (small.num_kv_heads < each.layout.tp) == (own.num_kv_heads < each.layout.tp), "ranks share heads as before"
    # Everything that is no size is the recipe's.
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "max_positions")
    alike = dict.fromkeys((*sizes, "windows", "query_scalar"), None)
    assert replace(own, **alike) == replace(small, **alike)
    assert {w is None for w in small.windows} <= {w is None for w in own.windows}
    if own.num_layers > 1:
        assert {w is None for w in small.windows} == {w is None for w in own.windows}


@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_twin_of_quantized_weights_has_whole_blocks(head_dim: int) -> None:
    sizes = {"hidden_size": 512, "head_dim": head_dim, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {**sizes, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1000, "max_position_embeddings": 512}
    written = {
        "model": {"family": "llama", "config": config},
        "data": {"seq_len": 512},
        "tuning": {"method": "lora", "quantize": "nf4"},
    }
    named = [ONE_PROCESS, parse("tp2"), parse("tp4")]
    twin = scaled_down(resolve(written), [each.layout for each in named])
    assert all(passes_the_door(twin.given, each) for each in named)
    small = in_layout(twin, ONE_PROCESS)
    assert (small.hidden_size == small.num_heads * small.head_dim) is (head_dim == 64)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_twin(path: Path) -> None:
    resolved = load(path)
    if resolved.hf_config is None:  # still on the hub
        sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 8192}
        folder = {"model_type": resolved.recipe.model.family or "llama", "vocab_size": 300, **sizes}
        resolved = replace(resolved, hf_config=folder)
    named = [ONE_PROCESS, parse("dp2")]
    for twin in (scaled_down(resolved, [each.layout for each in named]), full_size(resolved)):
        assert all(passes_the_door(twin.given, each) for each in named)
        assert network_of(resolve(recipe_in(twin.given, ONE_PROCESS))).family == network_of(resolved).family
        assert "nvme" not in json.dumps(twin.given)
    assert any(line.startswith("scaled down: ") for line in scaled_down(resolved, [Layout()]).changes)


# ------------------------------------------------------------------------------------------------------------ verdicts


def outcome(**changes: Any) -> Outcome:
    """What a layout of two ranks would leave; `changes` of rank 0's numbers, and of the tensors."""
    tensors = {"embed": np.array([1.0, 2.0]), "layer": np.array([[0.5, 0.25]]), "norm": np.array([1e-9, 0.0])}
    update, gradient = (tensors | changes.pop(kind, {}) for kind in ("update", "gradient"))
    initial = {"embed": "a", "layer": "b", "norm": "c"}
    first = RankResult([5.0, 4.0], [1.0, 2.0], [7, 7], [5.0, 5.0, 4.0], [1.0, 1.0, 2.0], {"embed [[0], [2]]": "x"}, initial)
    second = replace(first, initial={}, **changes.pop("second", {}))
    first = replace(first, **changes)
    numbers = {name: getattr(first, name) for name in ("losses", "norms", "targets", "losses64", "norms64")}
    if second.losses == [5.0, 4.0]:
        second = replace(second, **numbers)
    return Outcome([first, second], update, gradient)


def test_equal_bits_are_the_same() -> None:
    assert compare(outcome(), outcome()).verdict == "same"


SMALL = 1e-7
VERDICTS: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    "fp32 rounding": ({"losses": [5.0 * (1 + SMALL), 4.0]}, "rounding", None, ""),
    "float64 rounding": ({"gradient": {"layer": np.array([[0.5 + 1e-15, 0.25]])}}, "rounding", None, ""),
    "noise around zero": ({"gradient": {"norm": np.array([2e-16, 0.0])}, "update": {}}, "mistake", "norm", "gradient"),
    "initial weights": ({"initial": {"embed": "a", "layer": "?", "norm": "?"}}, "mistake", "layer", "initial weights"),
    "gradient": ({"gradient": {"layer": np.array([[0.5, 0.26]])}}, "mistake", "layer", "gradient"),
    "a small share of the gradient": ({"gradient": {"layer": np.array([[0.5 + 1e-9, 0.25]])}}, "mistake", "layer", "gradient"),
    "loss only": ({"losses64": [5.0 + 1e-8, 5.0 + 1e-8, 4.0]}, "mistake", None, "loss"),
    "norm only": ({"norms64": [1.0 + 1e-8, 1.0, 2.0]}, "mistake", None, "gradient norm"),
    "optimizer": ({"losses64": [5.0, 5.0, 4.0 + 1e-8]}, "mistake", None, "optimizer or clipping"),
    "not a number": ({"gradient": {"embed": np.array([1.0, math.nan])}}, "mistake", "embed", "gradient"),
    "twice the update": ({"update": {"layer": np.array([[1.0, 0.5]])}}, "mistake", "layer", "after the gradient"),
    "another loss in fp32 only": ({"losses": [5.0, 4.1]}, "mistake", None, "after the gradient"),
    "targets": ({"targets": [7, 8]}, "mistake", None, "number of targets"),
    "ranks disagree": ({"second": {"losses": [5.0, 4.5]}}, "mistake", None, "ranks have different"),
    "copies drift": ({"second": {"boxes": {"embed [[0], [2]]": "y"}}}, "mistake", "embed", "copies on several ranks"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    changes, verdict, first, where = VERDICTS[name]
    found = compare(outcome(**changes), outcome())
    assert (found.verdict, found.first, found.agrees) == (verdict, first, verdict != "mistake")
    assert found.where.startswith(where)


def test_differences_are_relative_to_the_tensor_but_not_to_noise() -> None:
    expected = {"a": np.array([2.0, -4.0]), "b": np.array([1e-12])}
    assert tensor_differences({"a": np.array([2.0, -3.0]), "b": np.array([3e-12])}, expected) == {
        "a": 0.25,
        "b": pytest.approx(2e-12 / (1e-3 * 4.0)),
    }
    assert tensor_differences({"a": expected["a"]}, expected) == {"a": 0.0, "b": math.inf}
    assert number_difference([1.0, 3.0], [1.0, 2.0]) == 0.5
    assert number_difference([1.0], [1.0, 2.0]) == math.inf
    assert number_difference([math.nan], [1.0]) == math.inf


def test_the_table_has_a_row_for_each_layout() -> None:
    rounding = Comparison("abc", 1e-7, 2e-7, 3e-6, 0.0, 0.0, 4e-16, "rounding")
    mistake = Comparison("abc", 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, "mistake", "h.0.weight", "gradient")
    rows = [Row("tp2", 2, rounding), Row("dp2", 2, mistake), Row("tp3", 3, refused="3 does not divide 4")]
    report = Report([], "abc", rows)
    out = StringIO()
    Console(file=out, width=160).print(table(report))
    title, reference, first, second, third = out.getvalue().splitlines()
    assert title.split()[:2] == ["layout", "weights"]
    assert reference.split()[:3] == ["one", "process", "abc"]
    assert first.split() == ["tp2", "abc", "1.0e-07", "2.0e-07", "3.0e-06", "0", "0", "4.0e-16", "rounding"]
    assert second.split()[-3:] == ["mistake", "h.0.weight", "(gradient)"]
    assert third.strip().endswith("refused    3 does not divide 4")
    assert not report.agrees
    assert [row.agrees for row in rows] == [True, False, False]
    assert Report([], "abc", rows[:1]).agrees


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_rank_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(LayoutFailed, match=r"^layout tp2, rank [01]: TypeError: .*missing.*\(.*job\.py:\d+\)$") as failed:
        run_ranks("tp2", tmp_path, 2, gpus=False, timeout_s=120)
    assert failed.value.exit_code == EXIT_INTERNAL
    assert_nobody_is_left()


def test_ranks_that_hang_are_ended_and_their_places_told(tmp_path: Path) -> None:
    (tmp_path / "job.json").mkdir()
    with pytest.raises(LayoutFailed):
        run_ranks("dp2", tmp_path, 2, gpus=False, timeout_s=120)  # from here on ranks start at once
    (tmp_path / "job.json").rmdir()
    os.mkfifo(tmp_path / "job.json")  # nobody writes to it
    with pytest.raises(
        LayoutFailed, match=r"^layout dp2: not done after 8 s .*: rank 0 at .*job\.py:\d+ in read; rank 1"
    ) as failed:
        run_ranks("dp2", tmp_path, 2, gpus=False, timeout_s=8)
    assert failed.value.exit_code == EXIT_HANG
    assert_nobody_is_left()


def test_a_killed_rank_ends_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.json")

    def kill_rank_1() -> None:
        while len(ranks := multiprocessing.active_children()) < 2 or not (tmp_path / "stack-1").exists():
            time.sleep(0.05)
        os.kill(sorted(rank.pid or 0 for rank in ranks)[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(LayoutFailed, match=r"^layout tp2, rank 1: killed by SIGKILL"):
        run_ranks("tp2", tmp_path, 2, gpus=False, timeout_s=120)
    killer.join()
    assert_nobody_is_left()


def assert_nobody_is_left() -> None:
    assert multiprocessing.active_children() == []
