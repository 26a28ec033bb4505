"""`triaxis plan`: what it shows is what the planner counts, and a device that is too small is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.here_sheets import content
from trainer.cli import main
from trainer.commands.network import known_network
from trainer.costs.flops import listed_peak
from trainer.planner.devices import CARDS, device, device_named_by_driver, measured_device, sheets
from trainer.planner.items import Place
from trainer.planner.memory import COMMUNICATORS, CONTEXT, WORKSPACE, memory
from trainer.planner.prediction import predict, with_format_of
from trainer.planner.verdict import verdict
from trainer.recipe import load
from trainer.recipe.batch_plan import BatchPlan, layout_of

ROOT = Path(__file__).parents[2]
LARGE = str(ROOT / "ds_configs" / "llama_70b_3d.json")


def planned(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_numbers_are_the_planners(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = load(LARGE)
    recipe, network = resolved.recipe, known_network(resolved)
    assert network is not None
    layout = layout_of(recipe.parallel, 64, "a test")
    ranks = memory(recipe, BatchPlan.from_recipe(recipe, 64, "a test"), network, layout)
    found = planned(LARGE, "--gpus", "64", capsys=capsys)
    assert [rank["peak"]["device"] for rank in found["ranks"]] == [rank.peak(Place.DEVICE) for rank in ranks]
    assert [len(rank["items"]) for rank in found["ranks"]] == [len(rank.items) for rank in ranks]
    assert found["disk_bytes"] == found["checkpoint_bytes"] * (recipe.checkpoint.keep + 1)


def test_more_data_parallel_ranks_need_less_each(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = [planned(LARGE, "--gpus", str(n), capsys=capsys)["ranks"][0]["peak"]["device"] for n in (32, 64, 128)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(("name", "code", "verdict"), [("h200", 0, "fits: "), ("rtx4090", 78, "does not fit: ")])
def test_a_device_gets_a_verdict(name: str, code: int, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, "--gpus", "64", "--device", name]) == code
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(verdict)]
    assert f"{name} has {device(name).memory / 2**30:.0f} GiB" in line


def test_a_device_that_has_no_sheet_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, "--device", "h100-80gb"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "no sheet has this name; did you mean h100-80g?" in line


def test_a_format_that_a_device_does_not_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "ds_configs" / "gpt2_pretrain.json"), "--device", "v100-32g"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "precision.dtype = bf16: v100-32g has no products in it; legal: fp16, fp32" in line


def test_devices_without_bf16_compute_in_fp32_where_they_decide() -> None:
    recipe = load(LARGE).recipe
    undecided = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"dtype": None})})
    formats = [with_format_of(undecided, on).precision.dtype for on in (None, device("h100-80g"), device("v100-32g"))]
    assert formats == ["bf16", "bf16", "fp32"]


def figures(sheet: dict[str, Any], above: str = "") -> list[str]:
    """The dotted names of a sheet's figures; the formats of `peaks` come from one table."""
    found = []
    for key, value in sheet.items():
        nested = isinstance(value, dict) and key != "peaks"
        found += figures(value, f"{key}.") if nested else [above + key]
    return found


@pytest.mark.parametrize("name", sheets())
def test_every_figure_of_a_sheet_has_its_source(name: str) -> None:
    sheet = dict(sheets()[name])
    sources = sheet.pop("sources")
    assert sorted(figure for of_it in sources.values() for figure in of_it) == sorted(figures(sheet))
    assert all(len(source) > 10 for source in sources)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("v100-32g", "Tesla V100-SXM2-32GB"),
        ("v100-16g", "Tesla V100-SXM2-16GB"),
        ("a100-40g", "NVIDIA A100-SXM4-40GB"),
        ("a100-80g", "NVIDIA A100-SXM4-80GB"),
        ("h100-80g", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
    ],
)
def test_peaks_are_those_that_a_runs_mfu_is_taken_of(name: str, card: str) -> None:
    peaks = device(name).peaks
    for dtype in ("bf16", "fp16", "fp32"):
        assert listed_peak(card, dtype) == peaks.get(dtype)


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", 39.4, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.4, None),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16g"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H200 NVL", 139.8, None),
        ("AMD Instinct MI300X", 191.5, "mi300x"),
        ("NVIDIA GeForce RTX 3090 Ti", 23.7, None),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GB200", 184.0, "gb200"),
        ("NVIDIA GeForce GTX 1080", 7.9, None),
    ],
)
def test_a_card_is_known_by_the_drivers_name(card: str, gib: float, name: str | None) -> None:
    found = device_named_by_driver(card, int(gib * 2**30))
    assert (found.name if found else None) == name


def test_the_cards_are_those_of_sheets() -> None:
    assert {name for names in CARDS.values() for name in names} <= sheets().keys()


def test_ranks_on_cores_need_host_memory_and_share_it() -> None:
    """No GPU's context is counted, and what a rank needs is its tensors and its process."""
    resolved = load(Path("ds_configs/nanogpt_shakespeare.json"), [])
    network = known_network(resolved)
    assert network is not None
    on_cores = measured_device(content())
    assert not on_cores.is_gpu
    planned = predict(resolved.recipe, network, 2, on_cores)
    (rank,) = planned.ranks
    assert not {item.name for item in rank.items} & {CONTEXT, COMMUNICATORS, WORKSPACE}
    assert planned.device_bytes == rank.peak(Place.DEVICE) + rank.peak(Place.HOST)
    assert planned.room == on_cores.memory // 2
    assert verdict(planned).endswith("GiB for each rank")
