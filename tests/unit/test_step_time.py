"""The parts of a step's time: each follows its sizes, and what is counted twice is counted twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.topology import Layout
from tests.unit import here_sheets
from trainer.cli import main
from trainer.costs.flops import matmul_weights
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.planner.collectives import all_gather, all_reduce, reduce_scatter, send
from trainer.planner.devices import Device, device, here, measured_device
from trainer.planner.job import job_of
from trainer.planner.our_layers import embedding_pass, head_pass, layer_pass
from trainer.planner.speeds import Table
from trainer.planner.step_time import Job, StepTime, step_time
from trainer.planner.zero_step import ZeroStep
from trainer.recipe.batch_plan import BatchPlan, layout_of
from trainer.schema import Recipe

HERE = measured_device(here_sheets.content())
GPU = device("h100-80g")
ON_CPU, ON_NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/nvme"}
FAMILIES = {
    "llama": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256},
}


def network(family: str = "llama", **keys: Any) -> TransformerConfig:
    return from_hf(family, {"vocab_size": 1000, **FAMILIES[family], **keys})


def job(ranks: int = 1, *, of: TransformerConfig | None = None, length: int = 256, **sections: Any) -> Job:
    """The job of a recipe on so many ranks, of four sequences for each rank and step."""
    given = {
        "model": {"family": "llama"},
        "data": {"seq_len": length},
        "batch": {"global_sequences": 4 * ranks, "micro_sequences": 2},
        "precision": {"dtype": "fp32"},
        **sections,
    }
    recipe = Recipe.model_validate(given)
    plan = BatchPlan.from_recipe(recipe, ranks, "a test")
    return job_of(recipe, plan, of or network(), layout_of(recipe.parallel, ranks, "a test"))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero": {"stage": stage, **more}}


def seconds(ranks: int = 1, on: Device = HERE, **keys: Any) -> float:
    return step_time(job(ranks, **keys), on).total


# ------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_are_those_that_the_model_needs(family: str) -> None:
    """Six operations for each weight and token, as `costs.flops` counts them, and none more."""
    config = network(family)
    share = job(of=config).share
    blocks = [embedding_pass(config, share), head_pass(config, share)]
    blocks += [layer_pass(config, share)] * config.num_layers
    works = [work for block in blocks for work in (block.forward, block.backward)]
    assert sum(product.flops for work in works for product in work.products) == 6 * matmul_weights(config) * share.tokens


def test_frozen_weights_have_no_gradients() -> None:
    share = job().share
    whole, frozen = layer_pass(network(), share), layer_pass(network(), replace(share, trains=False))
    assert sum(p.flops for p in frozen.backward.products) * 2 == sum(p.flops for p in whole.backward.products)
    assert seconds(tuning={"method": "lora"}) < seconds()


def test_weights_kept_in_fp32_are_rounded_where_they_are_used() -> None:
    rounded = job(precision={"dtype": "bf16"})
    kept = job(precision={"dtype": "bf16"}, **zero(2))
    assert (rounded.stored_bytes, kept.stored_bytes) == (4, 2)
    moved = [layer_pass(network(), one.share).forward.num_bytes for one in (rounded, kept)]
    weights = 4 * 256 * 256 + 3 * 256 * 704
    assert moved[0] - moved[1] == pytest.approx((4 + 2) * weights)


@pytest.mark.parametrize("on", [HERE, GPU], ids=["here", "h100"])
def test_more_work_takes_longer(on: Device) -> None:
    plain = seconds(on=on)
    assert seconds(on=on, of=network(num_hidden_layers=8)) > 1.5 * plain
    assert seconds(on=on, of=network(hidden_size=1024, intermediate_size=4096)) > plain
    assert seconds(on=on, length=1024) > plain
    assert seconds(on=on, train={"recompute": "full"}) > seconds(on=on, train={"recompute": "selective"}) > plain


# ------------------------------------------------------------------------------------------- ZeRO


def of_zero(ranks: int, on: Device = HERE, **sections: Any) -> ZeroStep:
    found = job(ranks, **sections).zero
    assert found is not None
    return ZeroStep(found, on.shared_by(ranks))


def test_weights_of_stage_3_are_gathered_for_every_micro_batch() -> None:
    once = of_zero(2, **zero(3))
    gathered = all_gather(4 * once.job.divided, 2, HERE.inside)
    assert once.gathers == (pytest.approx(gathered), 0.0)
    assert 0 < once.job.divided < once.job.trained, "small weights are kept whole"
    again = of_zero(2, **zero(3, stage3_max_live_parameters=0, stage3_max_reuse_distance=0))
    assert again.gathers == (pytest.approx(gathered), pytest.approx(gathered))
    two = step_time(job(2, **zero(3)), HERE)
    assert two.gathers == pytest.approx(2 * gathered)
    assert step_time(job(2, **zero(2)), HERE).gathers == 0.0


def test_stages_0_and_1_reduce_once_and_stages_2_and_3_in_every_micro_batch() -> None:
    def reduced(stage: int) -> tuple[float, float]:
        step = of_zero(2, **zero(stage))
        return step.reduction, step.backward(1.0)

    assert [reduced(stage)[0] > 0 for stage in range(4)] == [True, True, False, False]
    assert reduced(2)[1] > all_reduce(4 * of_zero(2, **zero(2)).job.trained, 2, HERE.inside)
    assert reduced(3)[1] > reduce_scatter(4 * of_zero(2, **zero(3)).job.trained, 2, HERE.inside)


def test_an_update_is_divided_from_stage_1_on() -> None:
    link = replace(GPU.inside, rate=1e18, latency=0.0)
    bare = replace(GPU, call=0.0, launch=0.0, inside=link, outside=link)
    updates = [step_time(job(64, precision={"dtype": "bf16"}, **zero(stage)), bare).optimizer for stage in (0, 2)]
    assert updates[1] < updates[0] / 32


def test_offloaded_states_cross_at_the_rate_of_the_link() -> None:
    offloaded = zero(2, offload_optimizer=ON_CPU)
    slow, fast = replace(GPU, to_device=10e9, to_host=10e9), replace(GPU, to_device=20e9, to_host=20e9)
    times = [of_zero(2, on, precision={"dtype": "bf16"}, **offloaded).update for on in (slow, fast)]
    own = of_zero(2, **offloaded).job.trained / 2
    assert times[0] - times[1] == pytest.approx(own * (4 + 2) * (1 / 10e9 - 1 / 20e9))


def test_adam_on_the_host_takes_as_long_as_the_host_says() -> None:
    fast, slow = replace(GPU, host_adam=2e9), replace(GPU, host_adam=1e9)
    times = [of_zero(1, on, precision={"dtype": "bf16"}, **zero(2, offload_optimizer=ON_CPU)).update for on in (slow, fast)]
    own = of_zero(1, **zero(2)).job.trained
    assert times[0] - times[1] > own * (1 / 1e9 - 1 / 2e9), "passes in host memory are slower too"


def test_states_on_nvme_are_read_and_written() -> None:
    on_host = of_zero(1, **zero(3, offload_optimizer=ON_CPU))
    on_disk = of_zero(1, **zero(3, offload_optimizer=ON_NVME))
    numbers = 1 + 2 + 1  # master weight, two moments, gradient
    swapped = 4 * numbers * on_disk.job.trained * (1 / 2e9 + 1 / 1e9)
    assert on_disk.update - on_host.update == pytest.approx(swapped)


def test_communication_hides_only_behind_a_device_that_runs_beside_it() -> None:
    def longer_by(on: Device, *, overlaps: bool) -> float:
        step = of_zero(8, on, precision={"dtype": "bf16"}, **zero(2, overlap_comm=overlaps))
        return step.backward(1.0)

    assert longer_by(GPU, overlaps=True) < longer_by(GPU, overlaps=False)
    assert longer_by(HERE, overlaps=True) == longer_by(HERE, overlaps=False)


def test_ranks_wait_for_the_slowest_the_longer_the_more_they_are() -> None:
    waits = [step_time(job(ranks), GPU).jitter for ranks in (1, 8, 64)]
    assert waits[0] == 0.0
    assert waits == sorted(waits)


def test_the_parts_are_the_whole() -> None:
    for on, keys in ((HERE, zero(3)), (GPU, {"parallel": {"tensor": 2}}), (GPU, {"parallel": {"pipeline": 2}})):
        found: StepTime = step_time(job(2, **keys), on)
        assert sum(found.parts.values()) == pytest.approx(found.total)


# ------------------------------------------------------------------------------------------- this machine


def test_a_measured_value_is_found_again_and_others_lie_between() -> None:
    table = Table.of({(64.0, 64.0): 10.0, (1024.0, 1024.0): 40.0})
    assert table.at(64, 64) == pytest.approx(10.0, rel=1e-3)
    assert 10.0 < table.at(256, 256) < 40.0
    assert table.at(4096, 4096) == pytest.approx(40.0, rel=0.2), "beyond the largest it is near it"


def test_collectives_take_what_two_ranks_measured() -> None:
    assert all_reduce(1 << 20, 2, HERE.inside) == pytest.approx(1e-3)
    assert all_reduce(1 << 27, 2, HERE.inside) == pytest.approx(128e-3)
    assert all_reduce(1 << 20, 4, HERE.inside) == pytest.approx(1.5e-3), "a ring of four carries three quarters"
    assert send(1 << 19, HERE.inside) == pytest.approx(0.5e-3), "half of it there, half of it back"


def test_more_ranks_than_were_measured_share_their_cores() -> None:
    two, four = HERE.shared_by(2).speed, HERE.shared_by(4).speed
    assert two is not None
    assert four is not None
    assert four.product_s(512, 512, 512, "fp32") == pytest.approx(2 * two.product_s(512, 512, 512, "fp32"))
    assert HERE.shared_by(1).speed != two
    assert GPU.shared_by(4) == GPU


def test_a_format_that_was_not_measured_takes_as_long_as_fp32() -> None:
    speed = HERE.speed
    assert speed is not None
    assert speed.product_s(64, 64, 64, "bf16") == speed.product_s(64, 64, 64, "fp32")


def test_this_machine_is_a_device_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_sheets.write(tmp_path / "triaxis" / "here.json")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert device("here") == replace(HERE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 1}, "has version 1 of the sheet, not 2"),
        ({"here": {}}, "cannot be read as a sheet"),
        ({"measured": {"alone": {}, "pair": None}}, "cannot be read as a sheet"),
    ],
)
def test_a_sheet_that_cannot_be_used_is_one_line(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = here_sheets.write(tmp_path / "here.json", **changes)
    with pytest.raises(RecipeError) as caught:
        here(path)
    assert told in str(caught.value)
    assert str(caught.value).endswith("run `triaxis doctor --measure`")


def test_a_machine_that_was_not_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    recipe = str(Path(__file__).parents[2] / "ds_configs" / "nanogpt_shakespeare.json")
    assert main(["plan", recipe, "--device", "here"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is not there, because this machine was not measured: run `triaxis doctor --measure`")


def test_a_pair_that_was_not_measured_leaves_one_rank(tmp_path: Path) -> None:
    content = here_sheets.content()
    alone = {**content["measured"], "pair": None}
    assert step_time(job(2), measured_device({**content, "measured": alone})).total > 0


def test_layouts_of_two_ranks_are_timed_here() -> None:
    plain = seconds()
    for keys in ({"parallel": {"tensor": 2}}, {"parallel": {"pipeline": 2}}, zero(1), zero(2), zero(3)):
        assert 0 < seconds(2, **keys) < 10 * plain
    assert job(2, parallel={"pipeline": 2}).layout == Layout(pp=2)
