"""A rank's memory as the sum of its items: what changes it, and by how much."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parallel.topology import Layout
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.planner.in_flight import Kept, by_name, most_in_flight
from trainer.planner.items import Item, Phase, Place, peak, total
from trainer.planner.memory import RankMemory, checkpoint_bytes, disk_bytes, memory
from trainer.planner.states import GRADIENTS, MASTERS, STATES, SWAP_BUFFERS, WEIGHTS
from trainer.recipe import load
from trainer.recipe.batch_plan import BatchPlan, layout_of
from trainer.recipe.pipeline import schedule_table
from trainer.schema import Recipe

ROOT = Path(__file__).parents[2]
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "max_position_embeddings": 4096,
}


def network() -> TransformerConfig:
    return from_hf("llama", CONFIG)


def planned(world_size: int = 8, **sections: Any) -> list[RankMemory]:
    given: dict[str, Any] = {
        "model": {"family": "llama", "config": CONFIG},
        "data": {"seq_len": 2048},
        "batch": {"global_sequences": 64, "micro_sequences": 1},
        "precision": {"dtype": "bf16"},
        **sections,
    }
    recipe = Recipe.model_validate(given)
    plan = BatchPlan.from_recipe(recipe, world_size, "the test")
    return memory(recipe, plan, network(), layout_of(recipe.parallel, world_size, "the test"))


def on_device(world_size: int = 8, **sections: Any) -> int:
    return max(rank.peak(Place.DEVICE) for rank in planned(world_size, **sections))


def test_a_peak_is_that_of_the_larger_phase() -> None:
    items = [Item("a", 10), Item("b", 7, phase=Phase.BACKWARD), Item("c", 9, phase=Phase.UPDATE), Item("d", 99, Place.HOST)]
    assert (peak(items, Place.DEVICE), peak(items, Place.HOST), peak(items, Place.NVME)) == (19, 99, 0)


def test_what_a_user_lowers_lowers_the_device() -> None:
    none = on_device()
    assert on_device(train={"recompute": "full"}) < on_device(train={"recompute": "selective"}) < none
    # With DeepSpeed's defaults, stage 3 keeps a billion gathered elements, and a bucket for all gradients of this model.
    bucket = {"reduce_bucket_size": 10_000_000}
    few = {"stage3_max_live_parameters": 1_000_000, "stage3_max_reuse_distance": 1_000_000, "stage3_prefetch_bucket_size": 0}
    assert on_device(zero={"stage": 3, **few, **bucket}) < on_device(zero={"stage": 2, **bucket}) < none
    assert on_device(zero={"stage": 2, "offload_optimizer": {"device": "cpu"}}) < on_device(zero={"stage": 2})
    assert on_device(parallel={"tensor": 4}) < on_device(parallel={"tensor": 2}) < none
    assert on_device(batch={"global_sequences": 64, "micro_sequences": 4}) > none
    tuned = {"method": "lora", "rank": 8}
    assert on_device(tuning={**tuned, "quantize": "nf4"}) < on_device(tuning=tuned) < none


def test_states_of_a_billion_weights_by_hand() -> None:
    """ZeRO-2 over 8 ranks in bf16: 2 bytes of each weight, and a rank's eighth of 4 + 8 + 4; padding is below 100 bytes."""
    weights = checkpoint_bytes(Recipe.model_validate({"checkpoint": {"every": 1}}), network()) // 12
    (rank,) = planned(zero={"stage": 2})
    assert total(rank.items, WEIGHTS) == pytest.approx(2 * weights, abs=100)
    assert total(rank.items, MASTERS, STATES, GRADIENTS) == pytest.approx(16 * weights / 8, abs=100)


def test_nvme_holds_what_is_swapped_and_the_host_its_buffers() -> None:
    nvme = {"device": "nvme", "nvme_path": "/swap"}
    (rank,) = planned(zero={"stage": 3, "offload_optimizer": nvme, "offload_param": {**nvme, "max_in_cpu": 0}})
    (plain,) = planned(zero={"stage": 3})
    states = total(plain.items, MASTERS, STATES)
    assert total(rank.items, MASTERS, STATES, place=Place.NVME) == pytest.approx(states, rel=0.01)  # norms are too small
    assert total(rank.items, WEIGHTS, place=Place.NVME) > 0
    assert total(rank.items, SWAP_BUFFERS, place=Place.HOST) > 0
    assert rank.peak(Place.DEVICE) < plain.peak(Place.DEVICE)


def test_the_first_of_uneven_stages_holds_the_micro_batches_in_flight() -> None:
    ranks = planned(parallel={"pipeline": 4, "balance": [1, 2, 2, 3]})
    assert [sum(block.kind == "layer" for blocks in rank.stages.values() for block in blocks) for rank in ranks] == [1, 2, 2, 3]
    notes = [next(item.note for item in rank.items if item.name.startswith("activations")) for rank in ranks]
    assert notes == [f"{number} micro-batches in flight" for number in (4, 3, 2, 1)]


@pytest.mark.parametrize(
    ("name", "virtual_stages"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]
)
def test_long_schedules_go_on_as_short_ones_began(name: str, virtual_stages: int) -> None:
    """The number of micro-batches at the peak, continued in a straight line, is that of the whole table."""
    ranks, count = 4, 96
    parallel = {"pipeline": ranks, "schedule": name, "virtual_stages": virtual_stages}
    recipe = Recipe.model_validate({"parallel": parallel, "batch": {"global_sequences": count}})
    table = schedule_table(recipe, BatchPlan.from_recipe(recipe, ranks, "the test"))
    for rank in range(ranks):
        of_stage = {stage: Kept(100, 10) for stage in table.stages(rank)}
        said = by_name(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=count, rank=rank, of_stage=of_stage)
        assert said.num_bytes(of_stage) == most_in_flight(table.steps[rank], of_stage).num_bytes(of_stage)


def test_the_bytes_of_a_real_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an earlier version, without the headers of its files."""
    folder = ROOT / "tests" / "end_to_end" / "earlier_run"
    monkeypatch.chdir(folder)
    files = list((folder / "run" / "checkpoints" / "step-00000003").glob("rank-*.safetensors"))
    tensors = sum(len(file.read_bytes()) - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    resolved = load(folder / "recipe.json", [])
    config = json.loads((folder / "run" / "checkpoints" / "step-00000003" / "hugging_face" / "config.json").read_text())
    said = checkpoint_bytes(resolved.recipe, resolved.network(vocab_size=config["vocab_size"]))
    assert said == tensors
    assert disk_bytes(resolved.recipe, resolved.network(vocab_size=config["vocab_size"])) == said * (
        resolved.recipe.checkpoint.keep + 1
    )


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path: Path) -> None:
    """At the smallest world size that divides its batch, unless its network is on the hub."""
    resolved = load(path, [])
    recipe = resolved.recipe
    try:
        network = resolved.network(vocab_size=32000, classes=("a", "b") if recipe.data.task == "classify" else ())
    except RecipeError:
        pytest.skip("its config.json is on the hub")
    replica = recipe.parallel.tensor * recipe.parallel.pipeline
    plan = BatchPlan.from_recipe(recipe, replica, "the test")
    ranks = memory(recipe, plan, network, Layout(tp=recipe.parallel.tensor, pp=recipe.parallel.pipeline))
    assert len(ranks) == recipe.parallel.pipeline
    for rank in ranks:
        assert all(item.num_bytes > 0 for item in rank.items)
        names = Counter((item.name, item.place, item.phase, item.note) for item in rank.items)
        assert max(names.values()) <= 3, "an item is shown once, or in a few parts"
        assert rank.peak(Place.DEVICE) > total(rank.items, WEIGHTS, place=Place.DEVICE)
