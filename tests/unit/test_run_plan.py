"""The plan of a run: what does not fit is refused before it begins, and exhausted memory is explained by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.errors import RecipeError
from trainer.exhausted import MORE_MEMORY, OutOfMemory, exhausted
from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.planner.devices import listed
from trainer.planner.items import Phase, Place
from trainer.planner.memory import GLOO_BYTES, PROCESS_BYTES
from trainer.planner.reliefs import is_legal, reliefs, with_value
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.memory_check import Machine, require_memory
from trainer.run.plan_outcome import introduced, outcome
from trainer.run.run_plan import RunPlan, explained, plan_of
from trainer.schema import Recipe
from trainer.stopwatch import Stopwatch

GIB = 2**30
CONFIG = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16},
    **{"vocab_size": 32_000, "max_position_embeddings": 2048},
}


def recipe_of(**sections: Any) -> Recipe:
    sections = {"data": {"seq_len": 2048}, "batch": {"global_sequences": 32, "micro_sequences": 4}, **sections}
    return Recipe.model_validate({"model": {"family": "llama", "config": CONFIG}, **sections})


def network() -> TransformerConfig:
    return from_hf("llama", CONFIG)


def planned(recipe: Recipe, world_size: int = 4, *, on_gpu: bool = True, rank: int = 0) -> RunPlan:
    found = plan_of(network(), recipe, world_size, "a test", on_gpu=on_gpu, device=None, rank=rank)
    assert found is not None
    return found


def require(plan: RunPlan, machine: Machine) -> None:
    batch = BatchPlan.from_recipe(plan.recipe, plan.prediction.layout.world_size, "a test")
    require_memory(plan.recipe, batch, plan.network, machine, plan)


@pytest.mark.parametrize(("share", "refused"), [(1.0, False), (1 / 1.07, False), (1 / 1.09, True)])
def test_what_is_planned_beyond_the_error_is_refused(share: float, refused: bool) -> None:
    plan = planned(recipe_of(precision={"dtype": "bf16"}))
    needed = plan.fullest.num_bytes
    machine = Machine(64 * GIB, 4, int(share * needed), [0] * 4)
    if not refused:
        require(plan, machine)
        return
    with pytest.raises(RecipeError) as error:
        require(plan, machine)
    (line,) = error.value.lines
    assert f"by the plan {needed / GIB:.2f} GiB are needed, and this GPU has {machine.gpu_bytes / GIB:.2f} GiB: " in line
    assert "most of each rank is optimizer states 1.49 GiB, " in line
    assert "train.recompute=full frees" in line
    assert "--no-plan-check starts it all the same" in line
    require_memory(plan.recipe, plan.prediction.batch, plan.network, machine)  # what that flag leaves


def test_the_fullest_rank_of_a_pipeline_is_named() -> None:
    plan = planned(recipe_of(parallel={"pipeline": 4}, batch={"global_sequences": 32}), rank=2)
    sizes = [rank.num_bytes for rank in plan.ranks]
    assert (plan.place, plan.fullest.rank) == (2, sizes.index(max(sizes)))
    with pytest.raises(RecipeError, match=f"most of rank {plan.fullest.rank} of the pipeline, the fullest, is"):
        require(plan, Machine(64 * GIB, 4, sizes[2] // 2, range(4)))


def test_ranks_on_a_host_share_its_memory_and_their_libraries() -> None:
    plan = planned(recipe_of(), on_gpu=False)
    each = plan.own.num_bytes
    assert each == plan.own.peak(Place.DEVICE) + plan.own.peak(Place.HOST)
    assert plan.host_bytes([plan.own] * 4) == 4 * each - 3 * max(PROCESS_BYTES, GLOO_BYTES)
    require(plan, Machine(plan.host_bytes([plan.own] * 4), 4, None, [0] * 4))
    with pytest.raises(RecipeError, match="are needed for the 4 ranks here, and this machine has"):
        require(plan, Machine(plan.host_bytes([plan.own] * 4) * 10 // 11, 4, None, [0] * 4))
    require(plan, Machine(plan.host_bytes([plan.own] * 4) * 10 // 11, 3, None, [0] * 3))


def test_offload_is_asked_of_the_host() -> None:
    plan = planned(recipe_of(zero={"stage": 2, "offload_optimizer": {"device": "cpu"}}), world_size=2)
    host = plan.host_bytes([plan.own] * 2)
    require(plan, Machine(host, 2, 80 * GIB, [0, 0]))
    with pytest.raises(RecipeError, match=r"this machine has .*: most of each rank is gradients .*; zero\.stage=3 frees"):
        require(plan, Machine(host * 10 // 11, 2, 80 * GIB, [0, 0]))


def test_a_model_of_transformers_has_no_plan() -> None:
    auto = AutoNetwork.__new__(AutoNetwork)
    assert plan_of(auto, recipe_of(), 1, "a test", on_gpu=True, device=None, rank=0) is None


def test_a_setting_frees_what_the_plan_of_the_changed_recipe_lacks() -> None:
    recipe = recipe_of()
    before = planned(recipe).fullest.peak(Place.DEVICE)
    found = reliefs(recipe, network(), 4, lambda ranks: max(rank.peak(Place.DEVICE) for rank in ranks))
    assert [relief.num_bytes for relief in found] == sorted((relief.num_bytes for relief in found), reverse=True)
    settings = {relief.setting: relief.num_bytes for relief in found}
    assert {setting.partition("=")[0] for setting in settings} >= {"zero.stage", "train.recompute", "batch.micro_sequences"}
    for setting, freed in settings.items():
        key, _, value = setting.partition("=")
        changed = with_value(recipe, key, int(value) if value.isdecimal() else value)
        assert is_legal(changed, network(), 4)
        assert before - planned(changed).fullest.peak(Place.DEVICE) == freed > 0


def test_no_setting_is_named_that_check_refuses() -> None:
    recipe = recipe_of(optimizer={"name": "adafactor"})  # which works at zero.stage 0, tensor degree 1
    found = reliefs(recipe, network(), 4, lambda ranks: max(rank.peak(Place.DEVICE) for rank in ranks))
    assert {relief.setting.partition("=")[0] for relief in found} == {"train.recompute", "batch.micro_sequences"}


@pytest.mark.parametrize(
    ("phase", "first"),
    [("forward", ""), ("optimizer", "optimizer states"), ("building the model", "optimizer states")],
)
def test_exhausted_memory_names_the_largest_items_and_what_frees_them(phase: str, first: str) -> None:
    plan, watch = planned(recipe_of()), Stopwatch(torch.device("cpu"))
    watch.phase = phase
    error = exhausted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), f"rank 0: {phase}")
    assert isinstance(error, OutOfMemory)
    assert error.on_device
    with pytest.raises(OutOfMemory) as told, explained(plan, watch):
        raise error
    (line,) = told.value.lines
    assert line.startswith(
        f"rank 0: {phase}: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; by the plan a rank"
    )
    assert f"most of it {first}" in line
    assert ("zero.stage=" in line) == (phase != "forward")
    assert ("train.recompute=full frees" in line) == (phase == "forward")
    with pytest.raises(OutOfMemory, match=r"lower batch\.micro_sequences"), explained(None, watch):
        raise error


def test_the_hosts_memory_is_told_from_a_gpus() -> None:
    plan = planned(recipe_of(zero={"stage": 3, "offload_optimizer": {"device": "cpu"}}))
    on_gpu, on_host = (plan.remedy(Phase.ALWAYS, frozenset((place,))) for place in (Place.DEVICE, Place.HOST))
    assert "optimizer states" in on_host
    assert "optimizer states" not in on_gpu
    assert plan.remedy(Phase.ALWAYS, frozenset((Place.NVME,))) == MORE_MEMORY


@pytest.mark.parametrize(
    ("said", "on_device"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error: Cuda failure 2 'out of memory'", True),
        (
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
            False,
        ),
    ],
)
def test_the_words_of_libraries_are_known(said: str, on_device: bool) -> None:
    error = exhausted(RuntimeError(said), "backward")
    assert isinstance(error, OutOfMemory)
    assert error.on_device == on_device


def test_the_time_of_a_step_is_planned_for_a_device_with_a_sheet() -> None:
    recipe = recipe_of(precision={"dtype": "bf16"})
    on = replace(listed("h100-80g"), calibration=1.5)
    plan = plan_of(network(), recipe, 4, "a test", on_gpu=True, device=on, rank=0)
    assert plan is not None
    assert plan.prediction.time is not None
    (line,) = introduced(plan)
    assert line.startswith(f"plan: {plan.own.num_bytes / GIB:.3g} GiB ± 8% on a rank; a step takes ")
    assert line.endswith(" on h100-80g")
    record = outcome(plan, [(7, 5), (8, 6)], 0.25)
    assert record["device"] == "h100-80g"
    assert record["calibration"] == 1.5
    assert record["predicted"] == {"memory_bytes": 8, "step_time_s": plan.prediction.time.total}
    # A V100 has no bf16, so its sheet says nothing of a step.
    old = plan_of(network(), recipe, 4, "a test", on_gpu=True, device=listed("v100-32g"), rank=0)
    assert old is not None
    assert old.prediction.time is None
    assert list(introduced(None)) == []
