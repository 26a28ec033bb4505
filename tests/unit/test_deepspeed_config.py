import os
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from trainer.convert.deepspeed_keys import REFUSED, refusal
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.errors import RecipeError
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import (
    Aio,
    CommsLogger,
    DeepSpeedPolicy,
    LossScale,
    OffloadOptimizer,
    OffloadParam,
    Precision,
    Recipe,
    Train,
    Zero,
)

NVME = {"device": "nvme", "nvme_path": "nvme"}


def plan_of(recipe: Recipe, dp: int = 2) -> BatchPlan:
    return BatchPlan.from_recipe(recipe, dp, "a test")


def built(recipe: Recipe, dp: int = 2, **more: Any) -> dict[str, Any]:
    return deepspeed_config(recipe, plan_of(recipe, dp), **more)


def infinity() -> Recipe:
    states = OffloadOptimizer(**NVME, pipeline_read=True)
    return Recipe(zero=Zero(stage=3, offload_optimizer=states, offload_param=OffloadParam(**NVME)))


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    # Without it the import looks for the compilers of accelerators that are not here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_deepspeed_reads_what_we_write(deepspeed: Any, stage: int, dtype: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = Recipe(zero=Zero(stage=stage), precision=Precision(dtype=dtype), train=Train(clip_norm=0.5))
    config = built(recipe, dp=1)
    read = DeepSpeedConfig(config)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (8, 1, 8)
    assert int(read.zero_optimization_stage) == stage
    assert read.gradient_clipping == (0.5 if stage else 0.0)
    assert read.bfloat16_config.enabled == (stage > 0 and dtype == "bf16")
    assert read.float16_config.enabled == (stage > 0 and dtype == "fp16")
    assert read.grad_accum_dtype == ("fp32" if stage else None)
    assert read.steps_per_print is None
    assert read.zero_allow_untested_optimizer
    assert not read.zero_force_ds_cpu_optimizer
    assert read.optimizer_name is None
    assert read.scheduler_name is None
    for key, value in config["zero_optimization"].items():
        theirs = getattr(read.zero_config, key.removeprefix("stage3_"))
        assert theirs == value, key


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_deepspeed_reads_offload_and_aio(deepspeed: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = infinity().model_copy(
        update={"deepspeed": DeepSpeedPolicy(aio=Aio(queue_depth=3), comms_logger=CommsLogger(enabled=True))}
    )
    read = DeepSpeedConfig(built(recipe, dp=1, largest_weight=1001))
    assert read.zero_config.offload_optimizer.device == "nvme"
    assert read.zero_config.offload_optimizer.pipeline_read
    assert str(read.zero_config.offload_param.nvme_path) == "nvme"
    assert read.zero_config.offload_param.buffer_size == 1001
    assert read.aio_config["queue_depth"] == 3
    assert read.comms_config.comms_logger.enabled


def test_the_loss_scale_is_ours() -> None:
    """A dynamic one would be DeepSpeed's, which changes it between scaling and unscaling."""
    for scale in (LossScale(initial_power=10, window=7), LossScale(static=128.0)):
        recipe = Recipe(precision=Precision(dtype="fp16", loss_scale=scale), zero=Zero(stage=1))
        assert built(recipe)["fp16"] == {"enabled": True, "loss_scale": 1.0}


def test_offload_blocks_only_where_something_is_offloaded() -> None:
    assert not {"offload_optimizer", "offload_param"} & built(Recipe(zero=Zero(stage=3)))["zero_optimization"].keys()
    config = built(Recipe(zero=Zero(stage=2, offload_optimizer=OffloadOptimizer(device="cpu"))))
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "nvme_path" not in config["zero_optimization"]["offload_optimizer"]
    assert "aio" not in config


def test_swap_buffers_hold_one_rank_s_part_of_the_largest_weight() -> None:
    def of(size: int | None, needed: int | None) -> dict[str, Any]:
        weights = OffloadParam(**NVME, buffer_size=size)
        config = built(Recipe(zero=Zero(stage=3, offload_param=weights)), dp=2, largest_weight=needed)
        return dict(config["zero_optimization"]["offload_param"])

    assert of(None, 1001)["buffer_size"] == 501
    assert of(600, 1001)["buffer_size"] == 600
    assert "buffer_size" not in of(None, None)
    with pytest.raises(RecipeError, match=r"= 500 elements cannot hold .* 1001 / 2 = 501; legal: 501 or more"):
        of(500, 1001)


def test_a_bucket_of_gradients_is_no_larger_than_they_are() -> None:
    """DeepSpeed takes the memory of a whole one."""
    import torch

    from trainer.engine.deepspeed_start import _with_full_buckets

    optimizer = torch.optim.SGD([{"params": [torch.zeros(3, 2)]}, {"params": [torch.zeros(5)]}], lr=0.1)
    buckets = [
        _with_full_buckets({"zero_optimization": {"stage": 2, "reduce_bucket_size": size}}, optimizer)["zero_optimization"]
        for size in (2**50, 11, 4)
    ]
    assert [bucket["reduce_bucket_size"] for bucket in buckets] == [11, 11, 4]
    assert buckets[0]["stage"] == 2


def test_communication_format_may_be_left_to_deepspeed() -> None:
    assert built(Recipe())["communication_data_type"] == "fp32"
    assert "communication_data_type" not in built(Recipe(deepspeed=DeepSpeedPolicy(communication_data_type=None)))


def test_the_recipe_is_not_changed() -> None:
    recipe = infinity()
    before = recipe.model_dump()
    built(recipe, largest_weight=8)
    assert recipe.model_dump() == before


# DeepSpeed's own list of keys


def names_of(model: Any) -> set[str]:
    return {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}


def check_names(ours: set[str], theirs: set[str], section: str) -> None:
    """Each of our keys is DeepSpeed's, and each of DeepSpeed's is ours or explained."""
    assert ours <= theirs, f"not DeepSpeed's: {ours - theirs}"
    unexplained = {name for name in theirs - ours if refusal(section, name) is None}
    assert not unexplained
    assert not ours & REFUSED.get(section, {}).keys(), "both taken and refused"


@pytest.mark.parametrize(
    ("section", "theirs"),
    [
        ("zero", "deepspeed.runtime.zero.config.DeepSpeedZeroConfig"),
        ("zero.offload_optimizer", "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig"),
        ("zero.offload_param", "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig"),
        ("deepspeed.comms_logger", "deepspeed.comm.config.CommsLoggerConfig"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_keys_of_its_models(deepspeed: Any, section: str, theirs: str) -> None:
    import importlib

    module, _, name = theirs.rpartition(".")
    ours = {"zero": Zero, "zero.offload_optimizer": OffloadOptimizer, "zero.offload_param": OffloadParam}.get(
        section, CommsLogger
    )
    check_names(set(ours.model_fields), names_of(getattr(importlib.import_module(module), name)), section)


def test_keys_of_aio(deepspeed: Any) -> None:
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    check_names(set(Aio.model_fields), set(AIO_DEFAULT_DICT), "deepspeed.aio")


class Recording(dict[str, Any]):
    """A dict that remembers which keys were asked for; copies remember together."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_keys_that_its_config_reads_at_the_top(deepspeed: Any) -> None:
    """What DeepSpeedConfig looks up, and what it refuses as removed, is taken or explained; we write nothing else."""
    from deepspeed.runtime import config as theirs

    written = Recording(built(infinity(), dp=1))
    theirs.DeepSpeedConfig(written)
    removed = set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert {"train_batch_size", "zero_optimization", "aio", "bf16"} <= written.asked
    assert set(written) <= written.asked
    unexplained = {key for key in written.asked | removed if refusal("deepspeed", key) is None} - set(
        DeepSpeedPolicy.model_fields
    )
    assert not unexplained
    assert set(theirs._REMOVED_ZERO_CONFIG_KEYS) <= REFUSED["zero"].keys()
