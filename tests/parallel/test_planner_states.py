"""The planner's model states are what real engines hold, byte for byte: weights, master weights, optimizer states, gradients,
buckets and copies, on every rank.

Seen after each gradient of a step of two micro-batches has been accumulated and before the last are reduced, and after the
step, for what lasts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.parallel.held_memory import held_by
from tests.parallel.training import ADAMW, CPU, CPU_ALL, Case, make_engine, micro_batches
from tests.spawn import spawn
from trainer.planner.items import Item, Phase, Place, total
from trainer.planner.memory import model_states
from trainer.planner.states import BUCKETS, COPIES, GRADIENTS, MASTERS, PERSISTENT, STATES, SWAP_BUFFERS, WEIGHTS


def held(mesh: Mesh, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """What this rank holds, and what the planner says."""
    engine = make_engine(mesh, case)
    seen: list[dict[str, int]] = []
    for parameter, _ in engine.specs:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: seen.append(held_by(engine)))
    for step in range(2):  # the states of the optimizer are there after the first
        seen.clear()
        engine.step(micro_batches(mesh, engine.plan, step), step=step, lr=ADAMW["lr"])
    lasting, summed = held_by(engine), seen[-1]
    real = {**lasting, "gradients": summed["gradients"], "buckets": summed["buckets"]}
    states = model_states(engine.recipe, engine.plan, engine.network, mesh.layout, data_rank=mesh.data.rank)
    return real, planned(states[mesh.pp.rank].items())


def planned(items: list[Item]) -> dict[str, int]:
    summed = [item for item in items if item.phase is not Phase.UPDATE]
    return {
        "weights": total(items, WEIGHTS, PERSISTENT),
        "masters": total(items, MASTERS),
        "states": total(items, STATES),
        "gradients": total(summed, GRADIENTS),
        "buckets": total(summed, BUCKETS),
        "copies": total(items, COPIES),
    }


def assert_exact(case: Case) -> None:
    case = replace(case, steps=2, accumulation=2)
    for real, said in spawn(held, Layout(dp=case.dp, tp=case.tp, pp=case.pp), case):
        assert said == real


STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    **{str(stage): (stage, {}) for stage in range(4)},
    **{f"{stage}-cpu": (stage, CPU) for stage in (1, 2, 3)},
    "3-cpu-all": (3, CPU_ALL),
}
EVERY_DAY = {("2", "fp32"), ("1", "bf16"), ("1-cpu", "bf16"), ("3-cpu-all", "bf16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in EVERY_DAY else [pytest.mark.grid])
        for name in STAGES
        for dtype in ("fp32", "bf16", "fp16")
    ],
)
def test_every_stage_format_and_offload(name: str, dtype: str) -> None:
    stage, zero = STAGES[name]
    assert_exact(Case(dp=2, stage=stage, zero=zero, dtype=dtype, optimizer=ADAMW))


def swapped(mesh: Mesh, case: Case, folder: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The bytes of this rank's swap files and of its swap buffers, and what the planner says."""
    engine = make_engine(mesh, case)
    for step in range(2):
        engine.step(micro_batches(mesh, engine.plan, step), step=step, lr=ADAMW["lr"])
    files = sum(path.stat().st_size for path in Path(folder).rglob("*.swp") if f"rank{mesh.rank}" in path.parts)
    buffers = [*engine.optimizer.optimizer_swapper.swap_buffer_manager.all_buffers, engine.specs[0][0].nvme_swapper.buffers]
    items = model_states(engine.recipe, engine.plan, engine.network, mesh.layout, data_rank=mesh.data.rank)[0].items()
    on_disk = sum(item.num_bytes for item in items if item.place is Place.NVME)
    return (files, sum(buffer.nbytes for buffer in buffers)), (on_disk, total(items, SWAP_BUFFERS))


@pytest.mark.grid
def test_what_is_on_nvme(tmp_path: Path) -> None:
    """Files of tensors of at least 1 MiB; smaller ones stay in memory."""
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"offload_optimizer": on_disk, "offload_param": on_disk, "sub_group_size": 400_000}
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    case = Case(dp=2, stage=3, zero=zero, dtype="bf16", config=wide, optimizer=ADAMW, accumulation=2)
    for real, said in spawn(swapped, Layout(dp=2), case, str(tmp_path)):
        assert said == real


LORA = {"method": "lora", "rank": 3}
LAYOUTS = {
    "tensor": Case(dp=2, tp=2, stage=2, dtype="bf16"),
    "tensor-padded": Case(tp=2, stage=0, dtype="bf16", config={"tie_word_embeddings": False}),
    "pipeline-tied": Case(dp=2, pp=2, stage=2, dtype="bf16", config={"num_hidden_layers": 4}),
    "pipeline-3": Case(dp=2, pp=2, stage=3, dtype="bf16", config={"num_hidden_layers": 3}, zero={"sub_group_size": 4000}),
    "pipeline-1": Case(dp=2, pp=2, stage=1, dtype="bf16", config={"num_hidden_layers": 3, "tie_word_embeddings": False}),
    "pipeline-1-fp16": Case(dp=2, pp=2, stage=1, dtype="fp16", config={"num_hidden_layers": 3}),
    "tiles": Case(dp=2, stage=3, dtype="bf16", zero={"sub_group_size": 3000}),
    "three": Case(dp=3, sequences=6, stage=1, dtype="bf16"),
    "three-2": Case(dp=3, sequences=6, stage=2, dtype="fp32"),
    "overlap": Case(dp=2, stage=2, dtype="bf16", zero={"overlap_comm": True, "reduce_bucket_size": 5000}),
    "lora": Case(dp=2, stage=2, dtype="bf16", tuning=LORA),
    "lora-0": Case(tp=2, stage=0, dtype="bf16", tuning=LORA),
    "lora-3": Case(dp=2, stage=3, dtype="bf16", tuning=LORA),
    "gpt2": Case(dp=2, tp=2, stage=1, dtype="fp32", family="gpt2"),
    "sgd": Case(dp=2, stage=1, dtype="bf16", optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9}),
    "adafactor": Case(dp=2, stage=0, dtype="bf16", optimizer={"name": "adafactor", "lr": 0.1}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("pipeline-3", "lora") else [pytest.mark.grid]) for name in LAYOUTS]
)
def test_every_layout_tuning_and_rule(name: str) -> None:
    case = LAYOUTS[name]
    assert_exact(
        case if case.optimizer["name"] in ("adafactor",) or "momentum" in case.optimizer else replace(case, optimizer=ADAMW)
    )
