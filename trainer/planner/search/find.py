"""The search: the layouts that are worth a plan are chosen by rough figures, planned exactly, and
pass the recipe's own rules. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.items import Place
from trainer.planner.prediction import MEMORY_BAND, Prediction, predict
from trainer.planner.search.choice import Choice
from trainer.planner.search.rough import Rough, Roughly
from trainer.planner.search.space import Space, admitted
from trainer.planner.step_time import StepTime
from trainer.recipe import ResolvedRecipe

T = TypeVar("T")
# The rough time of a layout is this close to its plan's, so that one that is slower by more than it
# cannot be the best; the rough memory is off by more where stages are uneven.
CLOSE_S, CLOSE_BYTES = 0.02, 0.15
MOST_PLANNED = 96  # layouts that are planned while the best is sought
RANKED = 10  # meshes in the ranking
EACH_MESH = 3  # layouts of a mesh that are planned for the ranking
ON_FRONT = 24  # rough steps of the front that are planned
WHOLE = 256  # spaces of so few layouts are planned whole


@dataclass(frozen=True)
class Planned:
    """A layout with its plan."""

    choice: Choice
    prediction: Prediction

    @property
    def time(self) -> StepTime:
        assert self.prediction.time is not None, "layouts are searched for a device"
        return self.prediction.time

    @property
    def seconds(self) -> float:
        return self.time.total

    @property
    def num_bytes(self) -> int:
        """The bytes that the fullest rank needs of its device."""
        return self.prediction.device_bytes

    @property
    def host_bytes(self) -> int:
        return max(rank.peak(Place.HOST) for rank in self.prediction.ranks)

    @property
    def tokens_per_s(self) -> float:
        return self.prediction.batch.tokens_per_step / self.seconds


@dataclass
class Search:
    """A search for the best layout of a recipe on so many devices of one kind."""

    resolved: ResolvedRecipe
    network: TransformerConfig
    world_size: int
    device: Device
    _planned: dict[Choice, Planned | None] = field(default_factory=dict)

    @cached_property
    def space(self) -> Space:
        return Space(self.resolved, self.network, self.world_size)

    @cached_property
    def rough(self) -> list[Rough]:
        """The layouts that may fit, the fastest first."""
        most = (1 + CLOSE_BYTES) * self._limit
        found = [one for one in Roughly(self.space, self.device, most) if one.num_bytes <= most]
        return sorted(found, key=lambda one: (one.seconds, one.num_bytes))

    @property
    def _limit(self) -> float:
        return (1 + MEMORY_BAND) * self.device.memory

    # ------------------------------------------------------------------------ exact plans

    def plan(self, choice: Choice) -> Planned | None:
        """Return a layout with its plan, None if a rule refuses it."""
        if choice not in self._planned:
            self._planned[choice] = self._plan(choice)
        return self._planned[choice]

    def _plan(self, choice: Choice) -> Planned | None:
        if admitted(self.resolved, self.network, choice, self.world_size) is None:
            return None
        try:
            recipe = choice.recipe(self.space.base)
            return Planned(choice, predict(recipe, self.network, self.world_size, self.device))
        except RecipeError:
            return None

    def fitting(self, choices: Iterable[Choice]) -> Iterator[Planned]:
        """Yield those of the choices that fit, or may fit, with their plans."""
        for choice in choices:
            planned = self.plan(choice)
            if planned is not None and planned.prediction.fits is not False:
                yield planned

    @property
    def planned(self) -> list[Planned]:
        """Return all layouts that have been planned and fit, or may fit, the best first."""
        fit = (one for one in self._planned.values() if one is not None and one.prediction.fits is not False)
        return sorted(fit, key=_order)

    # ------------------------------------------------------------------------ results

    @cached_property
    def best(self) -> Planned | None:
        """The fastest layout that surely fits; without one, the fastest that may fit."""
        if len(self.rough) <= WHOLE:
            return min(self.fitting(one.choice for one in self.rough), key=_order, default=None)
        best: Planned | None = None
        tries = 0
        for one in self.rough:
            sure = best is not None and best.prediction.fits
            if best is not None and sure and (one.seconds * (1 - CLOSE_S) > best.seconds or tries >= MOST_PLANNED):
                break
            for planned in self.fitting([one.choice]):
                best = min(filter(None, (best, planned)), key=_order)
            tries += 1
        return best

    @cached_property
    def ranked(self) -> list[Planned]:
        """The best layout of each mesh (tensor, pipeline, context), the best mesh first."""
        if self.best is None:
            return []
        tries: dict[tuple[int, ...], int] = {}
        for one in self.rough:
            mesh = one.passes.mesh
            tries.setdefault(mesh, 0)
            done = sum(count >= EACH_MESH for count in tries.values())
            if done >= RANKED:
                break
            if tries[mesh] < EACH_MESH:
                tries[mesh] += any(True for _ in self.fitting([one.choice]))
        best: dict[tuple[int, int, int], Planned] = {}
        for planned in self.planned:
            choice = planned.choice
            best.setdefault((choice.tensor, choice.pipeline, choice.context), planned)
        return [*best.values()][:RANKED]

    @cached_property
    def front(self) -> list[Planned]:
        """The layouts of which none is both faster and smaller, from the fastest to the smallest."""
        if self.best is None:
            return []
        rough = [*_front(self.rough, lambda one: one.num_bytes)]
        step = max(1, len(rough) // ON_FRONT)
        for _ in self.fitting(one.choice for one in [*rough[::step], *rough[-1:]]):
            pass
        return [*_front(self.planned, lambda one: one.num_bytes)]


def _order(planned: Planned) -> tuple[bool, float, int]:
    return planned.prediction.fits is not True, planned.seconds, planned.num_bytes


def _front(sorted_by_time: Sequence[T], size: Callable[[T], float]) -> Iterator[T]:
    """Yield those that are smaller than all faster ones."""
    smallest = math.inf
    for one in sorted_by_time:
        if size(one) < smallest:
            smallest = size(one)
            yield one
