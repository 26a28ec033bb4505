"""The plan of a recipe on a number of devices: the memory of each rank, and the time of a step.
No torch."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.topology import Layout
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.job import job_of
from trainer.planner.memory import RankMemory, memory
from trainer.planner.step_time import StepTime, step_time
from trainer.recipe.batch_plan import BatchPlan, layout_of
from trainer.recipe.pipeline import check_micro_batches
from trainer.schema import Recipe

# The mean error of memory on the runs of BigScience and nanotron is below it (the guide's table).
MEMORY_BAND = 0.08
# Three quarters of the published steps are within it: as computed, and where one step on such a
# device has given its calibration (the guide's table; a test holds the two).
TIME_BAND, CALIBRATED_BAND = 0.20, 0.10


def time_band(device: Device) -> float:
    """Return how far the time of a step on such a device may be off, as a share."""
    return TIME_BAND if device.calibration == 1.0 else CALIBRATED_BAND


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The plan of a recipe on devices of one kind; without a kind there is no time.

    `ranks`: the memory of each rank of the pipeline.
    """

    batch: BatchPlan
    layout: Layout
    device: Device | None
    ranks: list[RankMemory]
    time: StepTime | None

    @property
    def fullest(self) -> RankMemory:
        """The rank of the pipeline that needs the most of its device."""
        return max(self.ranks, key=lambda rank: rank.num_bytes)

    @property
    def device_bytes(self) -> int:
        """The bytes that the fullest rank needs of its device."""
        return self.fullest.num_bytes

    @property
    def room(self) -> int | None:
        """The bytes of memory that a device has; ranks on the cores of a machine share them. None
        for an unknown device."""
        on = self.device
        if on is None:
            return None
        if on.is_gpu:
            return on.memory
        return on.memory // min(self.layout.world_size, on.per_node)

    @property
    def fits(self) -> bool | None:
        """Return whether every rank fits its device; None where the plan cannot tell."""
        room = self.room
        if room is None:
            return None
        if self.device_bytes > (1 + MEMORY_BAND) * room:
            return False
        return True if self.device_bytes <= (1 - MEMORY_BAND) * room else None


def with_format_of(recipe: Recipe, device: Device | None) -> Recipe:
    """Return the recipe with the compute format that it has on such a device, bf16 for an unknown
    one. RecipeError if the device cannot multiply in it."""
    if recipe.precision.dtype is None:
        return recipe.with_format("bf16" if device is None or "bf16" in device.peaks else "fp32")
    dtype = recipe.precision.dtype
    if device is not None and dtype not in device.peaks:
        legal = ", ".join(device.peaks)
        raise RecipeError(f"precision.dtype = {dtype}: {device.name} has no products in it; legal: {legal}")
    return recipe


def predict(
    recipe: Recipe,
    network: TransformerConfig,
    world_size: int,
    device: Device | None,
    how: str = "--gpus",
    *,
    on_gpu: bool | None = None,
) -> Prediction:
    """Return the plan of a recipe on so many devices. `on_gpu`: they are GPUs, with what CUDA and
    NCCL take; None: as the device is, and unknown ones are. RecipeError if `world_size` ranks,
    known from `how`, cannot train it."""
    if on_gpu is None:
        on_gpu = device is None or device.is_gpu
    recipe = with_format_of(recipe, device)
    batch = BatchPlan.from_recipe(recipe, world_size, how)
    check_micro_batches(recipe, batch)
    layout = layout_of(recipe.parallel, world_size, how)
    return Prediction(
        batch=batch,
        layout=layout,
        device=device,
        ranks=memory(recipe, batch, network, layout, on_gpu=on_gpu),
        time=step_time(job_of(recipe, batch, network, layout), device) if device else None,
    )
