"""The plan of a run on the devices that it has: the memory of its ranks, the time of its step, and
what frees memory where there is none left. No torch.

A model of family "auto" has no plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from itertools import islice
from typing import TYPE_CHECKING

from trainer.exhausted import MORE_MEMORY, OutOfMemory
from trainer.model.config import TransformerConfig
from trainer.model.network import Network
from trainer.planner.devices import Device
from trainer.planner.items import Item, Phase, Place, held_at
from trainer.planner.memory import PROCESS, RESERVED, RankMemory
from trainer.planner.prediction import Prediction, predict
from trainer.planner.reliefs import Held, Relief, reliefs, with_value
from trainer.schema import Recipe

if TYPE_CHECKING:
    from trainer.stopwatch import Stopwatch

NAMED = 3  # items, and settings, that a line names
# The parts of a step by what a rank is at; anything else is before or after one.
PHASES = {"forward": Phase.BACKWARD, "backward": Phase.BACKWARD, "optimizer": Phase.UPDATE}


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run. `on_gpu`: the ranks compute on GPUs, and not on the host. `place`: this
    rank's number in its pipeline."""

    recipe: Recipe
    network: TransformerConfig
    prediction: Prediction
    on_gpu: bool
    place: int

    @property
    def ranks(self) -> Sequence[RankMemory]:
        return self.prediction.ranks

    @property
    def own(self) -> RankMemory:
        """The memory of this rank."""
        return self.ranks[self.place]

    @property
    def fullest(self) -> RankMemory:
        return self.prediction.fullest

    def fullest_bytes(self, ranks: Sequence[RankMemory]) -> int:
        return max(rank.num_bytes for rank in ranks)

    def host_bytes(self, ranks: Sequence[RankMemory]) -> int:
        """Return the bytes of the host that ranks need together. What is the same for all
        processes, the libraries, is there once."""
        shared = max(item.num_bytes for item in self.own.items if item.name == PROCESS)
        each = [rank.peak(Place.HOST) if self.on_gpu else rank.num_bytes for rank in ranks]
        return sum(each) - shared * (len(ranks) - 1)

    @property
    def places(self) -> frozenset[Place]:
        """The memories, of the planner's, that are the one in which this rank computes."""
        return frozenset((Place.DEVICE,) if self.on_gpu else (Place.DEVICE, Place.HOST))

    def largest(self, rank: RankMemory, places: frozenset[Place]) -> str:
        """Return the largest items of a rank, in these memories, at its fullest moment."""
        moments = [held_at(rank.items, places, phase) for phase in (Phase.BACKWARD, Phase.UPDATE)]
        return named(max(moments, key=_total))

    def remedy(self, phase: Phase, places: frozenset[Place]) -> str:
        """Return what fills these memories of this rank during a part of a step, and the settings
        that free most of it."""
        items = held_at(self.own.items, places, phase)
        if not items:
            return MORE_MEMORY
        freed = self.reliefs(lambda ranks: _total(held_at(ranks[self.place].items, places, phase)))
        held = f"by the plan a rank now holds {gib(_total(items))}, most of it {named(items)}"
        return f"{held}: {freeing(freed)}" if freed else f"{held}; {MORE_MEMORY}"

    def reliefs(self, held: Held) -> list[Relief]:
        """Return the settings that free most of what `held` counts."""
        world_size = self.prediction.layout.world_size
        return reliefs(self.recipe, self.network, world_size, held, on_gpu=self.on_gpu)


@singledispatch
def plan_of(
    network: Network, recipe: Recipe, world_size: int, how: str, *, on_gpu: bool, device: Device | None, rank: int
) -> RunPlan | None:
    """Return the plan of a recipe on so many ranks, known from `how`, as `rank` reads it; None
    where none can be made. `device`: of which kind the devices are, if that is known."""
    return None


@plan_of.register
def _(
    network: TransformerConfig, recipe: Recipe, world_size: int, how: str, *, on_gpu: bool, device: Device | None, rank: int
) -> RunPlan | None:
    if device is not None and recipe.precision.settled not in device.peaks:
        device = None  # its sheet says nothing of this format
    prediction = predict(recipe, network, world_size, device, how, on_gpu=on_gpu)
    place = prediction.layout.coord(rank).pp
    if recipe.train.auto_micro_batch:  # it is found by now
        recipe = with_value(recipe, "train.auto_micro_batch", False)
    return RunPlan(recipe=recipe, network=network, prediction=prediction, on_gpu=on_gpu, place=place)


@contextmanager
def explained(plan: RunPlan | None, watch: Stopwatch) -> Iterator[None]:
    """Say, of memory that is exhausted, what fills it by the plan and which settings free how much
    of it."""
    try:
        yield
    except OutOfMemory as error:
        if plan is None:
            raise
        phase = PHASES.get(watch.phase, Phase.ALWAYS)
        places = plan.places if error.on_device or not plan.on_gpu else frozenset((Place.HOST,))
        try:
            remedy = plan.remedy(phase, places)
        except MemoryError:  # not even a few numbers can be computed any more
            raise error from None
        raise error.remedied(remedy) from error


def _total(items: Sequence[Item]) -> int:
    return sum(item.num_bytes for item in items)


def named(items: Sequence[Item]) -> str:
    """Return the largest items with their sizes. What an allocator reserves follows from others."""
    shown = [item for item in items if item.name != RESERVED][:NAMED]
    return ", ".join(f"{item.name} {gib(item.num_bytes)}" for item in shown)


def freeing(freed: Sequence[Relief]) -> str:
    """Return the settings that free most."""
    return ", ".join(f"{relief.setting} frees {gib(relief.num_bytes)}" for relief in islice(freed, NAMED))


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3g} GiB" if num_bytes < 2**43 else f"{num_bytes / 2**40:,.0f} TiB"
