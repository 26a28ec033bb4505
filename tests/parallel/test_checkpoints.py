"""Runs that are interrupted and gone on with, in the same layout and in others, against the run that nobody disturbed.

The whole trainer runs on forked ranks. Dropout is on, embeddings are tied, and what is compared are bits: losses, norms, and
at the end every weight, every moment and what the run remembers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tools.campaign import exactness, reshard
from tools.campaign.cases import WAYS, Way, arguments, digests, numbers, write_recipe
from tools.campaign.ranks import run_ranks, train
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest

STEPS = 6
BY_NAME = {way.name: way for way in WAYS}
CPU = "zero.offload_optimizer.device=cpu"


def sample(cases: Iterable[Any], every_day: Collection[Any]) -> list[Any]:
    """Some cases run every day, the others with -m grid: a run takes a second or two to start and to end."""
    return [pytest.param(*case, marks=[] if case in every_day else [pytest.mark.grid]) for case in cases]


@pytest.mark.parametrize(
    ("name", "dtype"),
    sample(product(BY_NAME, ("fp32", "bf16")), {("dp2-zero3", "bf16")}),
)
def test_a_resumed_run_is_the_undisturbed_one(name: str, dtype: str, tmp_path: Path) -> None:
    exact, total = exactness.run(BY_NAME[name], dtype, STEPS, 3, tmp_path)
    assert (exact, total) == (2, 2)


OTHERS: dict[str, tuple[Way, str, dict[str, Any]]] = {
    "cpu-zero1": (Way("", 2, ("zero.stage=1", CPU)), "bf16", {}),
    "cpu-zero2": (Way("", 2, ("zero.stage=2", CPU)), "bf16", {}),
    "cpu-zero3": (Way("", 2, (*BY_NAME["dp2-zero3"].keys, CPU, "zero.offload_param.device=cpu")), "bf16", {}),
    "round-robin": (Way("", 2, ("zero.stage=2", CPU, "zero.round_robin_gradients=true")), "fp32", {}),
    "sub-groups": (Way("", 2, (*BY_NAME["dp2-zero3"].keys, "zero.sub_group_size=5000")), "bf16", {}),
    "fp16": (Way("", 2, ("zero.stage=1",)), "fp16", {"precision": {"loss_scale": {"initial_power": 20, "window": 2}}}),
    "fp16-zero0": (Way("", 1), "fp16", {"precision": {"loss_scale": {"initial_power": 20, "window": 2}}}),
    "momentum": (Way("", 2, ("zero.stage=2",)), "fp32", {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}),
    "plain-sgd": (Way("", 2, ("zero.stage=3",)), "fp32", {"optimizer": {"name": "sgd", "lr": 0.1}}),
    "adafactor": (Way("", 2, ("parallel.pipeline=2",)), "fp32", {"optimizer": {"name": "adafactor", "lr": 0.01}}),
    "async": (Way("", 2, ("zero.stage=1",)), "bf16", {"checkpoint": {"async": True}}),
    "zbv": (Way("", 2, ("parallel.pipeline=2", "parallel.virtual_stages=2", "parallel.schedule=zbv")), "fp32", {}),
}


@pytest.mark.parametrize("name", sample(zip(OTHERS, strict=True), {("fp16",)}))
def test_every_kind_of_state_is_resumed(name: str, tmp_path: Path) -> None:
    way, dtype, more = OTHERS[name]
    exact, total = exactness.run(way, dtype, STEPS, 4, tmp_path, **more)
    assert (exact, total) == (2, 2)


@pytest.mark.grid
def test_state_on_nvme_is_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "nvme"
    disk.mkdir()
    # A rank's share must exceed 1 MiB, or DeepSpeed keeps it in memory.
    on_disk = {"device": "nvme", "nvme_path": str(disk)}
    zero = {"offload_optimizer": on_disk, "offload_param": on_disk, "sub_group_size": 300_000}
    way = Way("", 2, BY_NAME["dp2-zero3"].keys)
    exact, total = exactness.run(way, "bf16", STEPS, 4, tmp_path, hidden=192, zero=zero)
    assert (exact, total) == (2, 2)


def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    """Handed from layout to layout through all eight, every tensor has the bits it began with."""
    recipe = write_recipe(tmp_path, steps=STEPS, every=3, keep=9)
    first = BY_NAME["dp2-zero1"]
    ended = run_ranks(train, arguments(recipe, tmp_path / "first", first), world_size=2, log=tmp_path / "log")
    assert ended.codes == (0, 0), ended.said
    checkpoint = start = tmp_path / "first" / "checkpoints" / "step-00000003"
    for name in ("tp2xpp2", "dp2-zero3", "pp2", "tp2", "dp2-zero2", "dp2-zero0", "one"):
        way, run = BY_NAME[name], tmp_path / f"in-{name}"
        ended = reshard.load_and_save(way, recipe, run, checkpoint, log=tmp_path / "log")
        assert not any(ended.codes), ended.said
        checkpoint = run / "checkpoints" / checkpoint.name
        assert digests(checkpoint) == digests(start), name


@pytest.mark.grid
def test_training_goes_on_the_same_in_another_layout(tmp_path: Path) -> None:
    passed, total = reshard.run(["dp2-zero3", "tp2xpp2"], 16, tmp_path)
    assert (passed, total) == (2, 2)


def test_only_the_newest_stay_and_the_last_step_is_saved(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=7, every=2, keep=2)
    ended = run_ranks(train, arguments(recipe, tmp_path / "run", BY_NAME["pp2"]), world_size=2, log=tmp_path / "log")
    assert ended.codes == (0, 0), ended.said
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert [step for step, _ in folder.steps()] == [7, 6]
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-00000006", "step-00000007"]
    manifest = Manifest.read(folder.steps()[0][1])
    assert (manifest.step, manifest.sequences) == (7, 56)


def test_an_older_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    """The newer ones leave the choice, and the history is cut and written again."""
    recipe = write_recipe(tmp_path, steps=6, every=2, keep=9)
    run, way = tmp_path / "run", BY_NAME["one"]
    assert run_ranks(train, arguments(recipe, run, way), world_size=1, log=tmp_path / "log").codes == (0,)
    expected = numbers(run), digests(run / "checkpoints" / "step-00000006")
    again = arguments(recipe, run, way, resume=str(run / "checkpoints" / "step-00000002"))
    ended = run_ranks(train, again, world_size=1, log=tmp_path / "log")
    assert ended.codes == (0,), ended.said
    assert (numbers(run), digests(run / "checkpoints" / "step-00000006")) == expected
    assert {path.name for path in (run / "checkpoints").glob("*.superseded")} == {
        "step-00000004.superseded",
        "step-00000006.superseded",
    }


# --------------------------------------------------------------------------------------- mistakes that must be caught


def moments_forgotten() -> None:
    from trainer.checkpoint.resume import CheckpointSource

    CheckpointSource.states = lambda source, name: ()


def update_count_forgotten() -> None:
    from trainer.engine.zero_state import ZeroState

    set_updates = ZeroState._set_updates
    ZeroState._set_updates = lambda state, tensor, updates: set_updates(state, tensor, 1)


def weights_not_rounded_again() -> None:
    from trainer.engine.zero_state import PartitionedState

    PartitionedState._round = lambda state: None


def share_of_the_first_rank() -> None:
    """Each rank restores what rank 0 has; what it saves is its own."""
    from trainer.engine.zero_state import DividedState

    restore = DividedState.restore

    def of_the_first(state: DividedState, *args: Any, **kwargs: Any) -> None:
        first = copy.copy(state)
        first._group = replace(state._group, rank=0)
        restore(first, *args, **kwargs)

    DividedState.restore = of_the_first


def history_counted_from_zero() -> None:
    from trainer.checkpoint.checkpoints import Checkpoints

    Checkpoints.memory = {}


def loss_scale_forgotten() -> None:
    from trainer.engine.loss_scale import LossScaler

    LossScaler.restore = lambda scaler, state: None


def one_step_skipped() -> None:
    from trainer.checkpoint.checkpoints import Checkpoints

    start = Checkpoints.start_step.fget
    Checkpoints.start_step = property(lambda checkpoints: start(checkpoints) + 1)


def order_of_the_data_begins_again() -> None:
    from trainer.data.loader import TrainData

    batches, seen = TrainData.micro_batches, []

    def from_zero(data: TrainData, step: int, **place: int) -> Any:
        seen.append(step)
        return batches(data, len(seen) - 1, **place)

    TrainData.micro_batches = from_zero


def dropout_begins_again() -> None:
    from parallel.rng import Streams

    of_step, first = Streams.of_step, []

    def from_zero(seed: int, step: int, sequences: range) -> Streams:
        first.append(step)
        return of_step(seed, step - first[0], sequences)

    Streams.of_step = staticmethod(from_zero)


def schedule_begins_again() -> None:
    import trainer.loop

    lr_at, seen = trainer.loop.lr_at, []

    def from_zero(step: int, **keys: Any) -> float:
        seen.append(step)
        return lr_at(len(seen) - 1, **keys)

    trainer.loop.lr_at = from_zero


FP16 = {"precision": {"loss_scale": {"initial_power": 20, "window": 2}}}
MISTAKES: list[tuple[Callable[[], None], str, str, dict[str, Any]]] = [
    (moments_forgotten, "dp2-zero1", "fp32", {}),
    (update_count_forgotten, "dp2-zero3", "fp32", {}),
    (weights_not_rounded_again, "dp2-zero2", "bf16", {}),
    (share_of_the_first_rank, "dp2-zero3", "fp32", {}),
    (history_counted_from_zero, "one", "fp16", FP16),
    (loss_scale_forgotten, "dp2-zero1", "fp16", FP16),
    (one_step_skipped, "one", "fp32", {}),
    (order_of_the_data_begins_again, "one", "fp32", {}),
    (dropout_begins_again, "pp2", "fp32", {}),
    (schedule_begins_again, "one", "fp32", {}),
]


EVERY_DAY = {"moments_forgotten", "weights_not_rounded_again"}


def train_with(mistake: str, command: Sequence[str]) -> int:
    """`train`, with one of the mistakes."""
    make: Callable[[], None] = globals()[mistake]
    make()
    return train(command)


@pytest.mark.parametrize(
    ("mistake", "name", "dtype", "more"),
    [
        pytest.param(m.__name__, *how, marks=[] if m.__name__ in EVERY_DAY else [pytest.mark.grid], id=m.__name__)
        for m, *how in MISTAKES
    ],
)
def test_a_mistake_in_resuming_is_caught(mistake: str, name: str, dtype: str, more: dict[str, Any], tmp_path: Path) -> None:
    """What differs, or cannot go on, is not exact."""
    exact, total = exactness.run(BY_NAME[name], dtype, STEPS, 4, tmp_path, resumed=partial(train_with, mistake), **more)
    assert total == 2
    assert exact < total, f"{mistake} went unseen"
