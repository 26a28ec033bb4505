"""A run that tries its worst case first trains the same to the bit: losses, norms, weights and moments, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import WAYS, Way, arguments, digests, numbers, remembered, write_recipe
from tools.campaign.ranks import run_ranks, train

CPU = "zero.offload_optimizer.device=cpu"
SMALL = "zero.stage3_param_persistence_threshold=100"
NVME = ("zero.stage=3", SMALL, "zero.offload_optimizer.device=nvme", "zero.offload_optimizer.nvme_path=nvme")
BY_NAME = {way.name: way for way in WAYS} | {
    "zbv": Way("zbv", 2, ("parallel.pipeline=2", "parallel.schedule=zbv", "parallel.virtual_stages=2")),
    "pp2-zero3": Way("pp2-zero3", 2, ("parallel.pipeline=2", "zero.stage=3", SMALL)),
    "cpu-zero1": Way("cpu-zero1", 2, ("zero.stage=1", CPU)),
    "cpu-zero2": Way("cpu-zero2", 2, ("zero.stage=2", CPU)),
    "cpu-zero3": Way("cpu-zero3", 2, ("zero.stage=3", SMALL, CPU, "zero.offload_param.device=cpu")),
    "nvme": Way("nvme", 2, NVME),
    "lora": Way("lora", 1, ("tuning.method=lora", "zero.stage=2")),
    "adalora": Way("adalora", 1, ("tuning.method=adalora", "zero.stage=1")),
    "full": Way("full", 2, ("parallel.tensor=2", "train.recompute=full")),
}
EVERY_DAY = {("dp2-zero2", "bf16"), ("pp2", "fp32")}


def trained(folder: Path, way: Way, dtype: str, *keys: str) -> tuple[Any, ...]:
    """What a run of four steps has logged and saved."""
    recipe = write_recipe(folder, steps=4, every=4, keep=1, precision={"dtype": dtype}, data=DATA)
    command = arguments(recipe, folder / "run", way, *keys)
    ended = run_ranks(train, command, world_size=way.processes, log=folder / "log")
    assert ended.codes == (0,) * way.processes, ended.said
    checkpoint = folder / "run" / "checkpoints" / "step-00000004"
    return numbers(folder / "run"), digests(checkpoint), {**remembered(checkpoint), "memory": None}


DATA = {"eval_fraction": 0.1}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in EVERY_DAY else [pytest.mark.grid])
        for name in BY_NAME
        for dtype in ("fp32", "bf16", "fp16")
    ],
)
def test_trying_the_worst_case_changes_no_bit(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = trained(tmp_path / "tried", BY_NAME[name], dtype, "train.worst_case_first=true")
    assert tried == trained(tmp_path / "plain", BY_NAME[name], dtype, "train.worst_case_first=false")
