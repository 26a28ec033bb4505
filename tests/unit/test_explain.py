"""The explanation of a plan: FLOPs, traffic, days and the checkpoint interval by their formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tools.published.comparison import FOLDER
from tools.validate_planner import TIME, compared
from trainer.cli import main
from trainer.commands.network import known_network
from trainer.costs.blocks import count_parameters
from trainer.costs.flops import training_flops
from trainer.planner.devices import device
from trainer.planner.explain import best_interval, explain, step_flops
from trainer.planner.prediction import CALIBRATED_BAND, TIME_BAND, predict, time_band
from trainer.planner.traffic import Medium, Traffic
from trainer.recipe import load

ROOT = Path(__file__).parents[2]
LARGE = str(ROOT / "ds_configs" / "llama_70b_3d.json")
SMALL = str(ROOT / "ds_configs" / "gpt2_pretrain.json")


def traffic(recipe_file: str, gpus: int, *settings: str, per_node: int = 8) -> dict[tuple[str, Medium], float]:
    resolved = load(recipe_file, settings)
    recipe, network = resolved.recipe, known_network(resolved)
    assert network is not None
    plan = predict(recipe, network, gpus, None)
    if recipe.precision.dtype is None:
        recipe = recipe.with_format("bf16")
    found = Traffic(recipe=recipe, batch=plan.batch, network=network, layout=plan.layout, per_node=per_node)
    return {(one.what, one.medium): one.num_bytes for one in found.transfers()}


def parameters(recipe_file: str) -> int:
    network = known_network(load(recipe_file))
    assert network is not None
    return count_parameters(network)


@pytest.mark.parametrize(("stage", "sent"), [(1, 2 * 4 + 2), (2, 2 * 4 + 2), (3, 4 + 2)])
def test_what_deepspeed_sends_of_a_parameter(stage: int, sent: int) -> None:
    """Below stage 3 it all-reduces gradients, 2 (n − 1)/n times their 4 bytes, and gathers weights of 2 bytes after
    the update; at stage 3 it gathers them before, and all of a model of 110 M are kept until backward."""
    found = traffic(SMALL, 8, "batch.global_sequences=64", "batch.micro_sequences=8", f"zero.stage={stage}")
    assert sum(found.values()) == pytest.approx(sent * 7 / 8 * parameters(SMALL), rel=2e-3)


def test_stage_3_gathers_again_what_it_does_not_keep() -> None:
    """Three times the parameters where nothing is kept (arXiv:1910.02054, section 7)."""
    none_kept = ("zero.stage3_max_live_parameters=0", "zero.stage3_max_reuse_distance=0", "zero.stage=3")
    none_kept += ("deepspeed.communication_data_type=bf16",)
    found = traffic(SMALL, 8, "batch.global_sequences=64", "batch.micro_sequences=8", *none_kept)
    assert sum(found.values()) == pytest.approx(3 * 2 * 7 / 8 * parameters(SMALL), rel=2e-3)


def test_without_zero_gradients_are_summed_once() -> None:
    found = traffic(SMALL, 8, "zero.stage=0")
    assert found == {("gradients", Medium.NODE): pytest.approx(2 * 7 / 8 * 4 * parameters(SMALL), rel=1e-3)}


def test_tensor_ranks_send_twelve_hidden_states_of_a_layer_with_recomputation() -> None:
    """12 · tokens · hidden for each layer (ibid., section 8)."""
    found = traffic(LARGE, 32, "train.recompute=full", "parallel.schedule=1f1b", "parallel.virtual_stages=1")
    recipe = load(LARGE).recipe
    tokens = recipe.batch.global_sequences * recipe.data.seq_len
    assert found["tensor sums", Medium.NODE] == pytest.approx(12 * 7 / 8 * tokens * 8192 * 2 * 80 / 4)
    # A rank in the middle sends to both sides; with sequence parallelism an eighth of the tokens.
    assert found["pipeline", Medium.NETWORK] == pytest.approx(2 * tokens / 8 * 8192 * 2)


def test_a_v_shaped_pipeline_turns_without_sending() -> None:
    """The last rank of zbv holds two neighbouring stages, so it sends half of what one in the middle does."""
    settings = ("parallel.virtual_stages=2", "parallel.schedule=zbv", "parallel.pipeline=2")
    two = traffic(LARGE, 16, *settings)
    loops = traffic(LARGE, 16, *settings[::2], "parallel.schedule=looped_bfs")
    assert two["pipeline", Medium.NETWORK] == pytest.approx(loops["pipeline", Medium.NETWORK] * 2 / 3)


def test_the_link_is_that_of_the_node() -> None:
    assert ("gradients", Medium.NODE) in traffic(SMALL, 16, per_node=16)
    assert ("gradients", Medium.NETWORK) in traffic(SMALL, 16, per_node=8)


def test_offload_passes_the_host_and_nvme() -> None:
    nvme = 'zero.offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}'
    found = traffic(SMALL, 1, "zero.stage=3", nvme, 'zero.offload_param={"device": "cpu"}', "batch.global_sequences=32")
    whole = parameters(SMALL)
    assert found["gradients, master weights, optimizer states", Medium.NVME] == pytest.approx(2 * 16 * whole, rel=1e-3)
    assert found["gradients and weights", Medium.HOST] == pytest.approx(6 * whole, rel=1e-3)
    assert found["weights", Medium.HOST] == pytest.approx(2 * 2 * whole, rel=2e-3)  # two micro-batches


# ------------------------------------------------------------------------------------------------- FLOPs, MFU and time


def explained(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["step"]
    return found


def test_the_figures_fit_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(LARGE, "--gpus", "64", "--device", "h100-80g", "--tokens", "15T", capsys=capsys)
    resolved = load(LARGE)
    network = known_network(resolved)
    assert network is not None
    assert found["flops"] == training_flops(network, [resolved.recipe.data.seq_len] * 512)
    assert found["mfu"] == pytest.approx(found["flops"] / (64 * 989e12 * found["step_s"]))
    training = found["training"]
    assert training["steps"] == math.ceil(15e12 / found["tokens_per_step"])
    assert training["days"] * 86400 == pytest.approx(training["steps"] * found["step_s"])
    assert training["device_hours"] == pytest.approx(training["days"] * 24 * 64)


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, "--gpus", "64", "--device", "h100-80g", "--tokens", "1B", "--mtbf-hours", "50000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = (
        "tokens: 2,097,152 in a step; model FLOPs: ",
        "time: ",
        "MFU: between ",
        "moved between nodes: ",
        "moved inside a node: ",
    )
    for start in (*starts, "1,000,341,504 tokens: 477 steps, ", "save every "):
        assert any(line.startswith(start) for line in lines), start


def test_without_a_device_there_is_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = load(SMALL)
    network = known_network(resolved)
    assert network is not None
    found = explain(resolved.recipe, network, predict(resolved.recipe, network, 8, None))
    assert [line.partition(":")[0] for line in found.lines()] == ["tokens"]


def test_frozen_weights_have_no_gradient() -> None:
    """Four instead of six for each weight, and six for what is trained beside them."""
    resolved = load(SMALL)
    tuned = load(SMALL, ["tuning.method=lora", "tuning.rank=8"])
    network = known_network(resolved)
    assert network is not None
    whole, of_tuned = (step_flops(one.recipe, network, 1) for one in (resolved, tuned))
    assert 4 / 6 < of_tuned / whole < 0.75


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--tokens", "15X"), "'15X' is not a number of tokens, as 15T, 300B or 1.5M"),
        (("--tokens", "0"), "'0' is not a number of tokens, as 15T, 300B or 1.5M"),
        (("--mtbf-hours", "0"), "'0' is not a number above 0"),
        (("--disk-rate", "-1"), "'-1' is not a number of at least 0"),
    ],
)
def test_what_is_no_number_is_one_line(words: tuple[str, str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SMALL, *words]) == 78
    assert fault in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the time's error band


@pytest.mark.parametrize(("band", "calibrated"), [(TIME_BAND, False), (CALIBRATED_BAND, True)])
def test_the_band_is_that_of_the_validation(band: float, calibrated: bool) -> None:
    """It holds three of four published steps, each table counted alike: as computed, and where a row gave a scalar."""
    shares = []
    for table in TIME:
        if table.reference or not calibrated:
            factor = 1.0 if calibrated else 1 / table.scalar
            shares.append(mean(abs(factor * row.ours / row.published - 1) <= band for row in compared(table, FOLDER)))
    assert mean(shares) >= 0.75


def test_a_calibrated_device_has_the_narrower_band() -> None:
    on = device("a100-80g")
    assert time_band(on) == TIME_BAND
    assert time_band(replace(on, calibration=1.1)) == CALIBRATED_BAND


# ------------------------------------------------------------------------------------------- the interval of checkpoints


def lost(interval: float, checkpoint: float, mtbf: float) -> float:
    """Daly's whole model, equation 20: the time of a training over the work in it, when a restart takes no time."""
    return mtbf * (math.exp((interval + checkpoint) / mtbf) - 1) / interval


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2, 0.1, 0.5])
def test_the_interval_loses_the_least(share: float) -> None:
    """Within a thousandth of the least that any interval loses."""
    mtbf = 1000.0
    checkpoint = share * mtbf
    least = min(lost(mtbf * step / 2000, checkpoint, mtbf) for step in range(1, 8000))
    assert lost(best_interval(checkpoint, mtbf), checkpoint, mtbf) <= 1.001 * least


def test_the_interval_is_youngs_where_failures_are_rare() -> None:
    assert best_interval(10.0, 1e9) == pytest.approx(math.sqrt(2 * 10.0 * 1e9), rel=1e-3)
    assert best_interval(100.0, 10.0) == 10.0


def test_more_devices_fail_more_often(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        explained(LARGE, "--gpus", gpus, "--device", "h100-80g", "--mtbf-hours", "50000", capsys=capsys)["saving"]
        for gpus in ("64", "128")
    ]
    assert rows[0]["mtbf_s"] == 2 * rows[1]["mtbf_s"] == 50000 * 3600 / 64
    assert rows[0]["interval_s"] > rows[1]["interval_s"]
