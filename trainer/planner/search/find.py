"""The search: the layouts that are worth a plan are chosen by rough figures, planned exactly, and
pass the recipe's own rules. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.prediction import MEMORY_BAND, predict, with_format_of
from trainer.planner.search.choice import Choice
from trainer.planner.search.near import Near, neighbours
from trainer.planner.search.planned import Planned
from trainer.planner.search.reasons import Reason, reason
from trainer.planner.search.rough import Rough, Roughly
from trainer.planner.search.space import Mesh, Space, admits
from trainer.recipe import ResolvedRecipe

T = TypeVar("T")
# The rough time of a layout is this close to its plan's, so that one that is slower by more than it
# cannot be the best; the rough memory is off by more where stages are uneven.
CLOSE_S, CLOSE_BYTES = 0.02, 0.08
MOST_PLANNED = 96  # layouts that are planned while the best is sought
MOST_LOOKED_AT = 600  # of them, where rules refuse most or few surely fit
SMALLEST = 48  # layouts that are planned where that was in vain
RANKED = 10  # meshes in the ranking
EACH_MESH = 2  # layouts of a mesh that are planned for the ranking
ON_FRONT = 24  # rough steps of the front that are planned
SLOWEST = 2.0  # times the best's time, beyond which the front is of no use
WHOLE = 256  # spaces of so few layouts are planned whole


class Neighbour(NamedTuple):
    """A neighbour of the best layout, that differs in a key, and in what must change along."""

    key: str
    near: Near
    planned: Planned
    reason: Reason


@dataclass
class Search:
    """A search for the best layout of a recipe on so many devices of one kind. RecipeError if these
    have no products in the recipe's compute format."""

    resolved: ResolvedRecipe
    network: TransformerConfig
    world_size: int
    device: Device
    most_planned: int = MOST_PLANNED
    _planned: dict[Choice, Planned | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with_format_of(self.resolved.recipe, self.device)

    @cached_property
    def space(self) -> Space:
        return Space(self.resolved, self.network, self.world_size, self.device)

    @cached_property
    def rough(self) -> list[Rough]:
        """The layouts that may fit, the fastest first."""
        most = (1 + CLOSE_BYTES) * self._limit
        found = [one for one in Roughly(self.space, self.device, most).of(self.space.passes) if one.num_bytes <= most]
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
        if not admits(self.space, choice):
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
        return sorted(fit, key=lambda one: one.order)

    # ------------------------------------------------------------------------ results

    @cached_property
    def best(self) -> Planned | None:
        """The fastest layout that surely fits; without one, the fastest that may fit. No neighbour
        of it is better."""
        best = self._first_best()
        while best is not None:
            near = [one.choice for ones in neighbours(self.space, best.choice).values() for one in ones]
            better = self._better(best, near)
            if better is best:
                break
            best = better
        return best

    @cached_property
    def own(self) -> Planned | None:
        """The recipe as it is; None if it cannot run on so many devices."""
        return self.plan(Choice.of(self.resolved.recipe))

    def _first_best(self) -> Planned | None:
        """Return the best of the layouts whose rough time is close to the best's."""
        if len(self.rough) <= WHOLE:
            return self._better(None, [one.choice for one in self.rough])
        best: Planned | None = None
        for tries, one in enumerate(self.rough):
            if best is not None and best.prediction.fits:
                if one.seconds * (1 - CLOSE_S) > best.seconds or tries >= self.most_planned:
                    return best
            elif self._is_enough:
                break
            best = self._better(best, [one.choice])
        # What surely fits is slow: the smallest ones are the last chance.
        smallest = sorted(self.rough, key=lambda one: one.num_bytes)[:SMALLEST]
        return self._better(best, [one.choice for one in smallest])

    def _better(self, best: Planned | None, choices: Iterable[Choice]) -> Planned | None:
        """Return the best of these choices and the one that was best before, which stays among
        equals."""
        found = [*([best] if best is not None else []), *self.fitting(choices)]
        return min(found, key=lambda one: one.order, default=None)

    @property
    def _is_enough(self) -> bool:
        """Return whether so many layouts have been looked at that the rest would take too long."""
        return len(self._planned) >= MOST_LOOKED_AT

    @cached_property
    def neighbours(self) -> list[Neighbour]:
        """The neighbours of the best layout, each with the reason why it loses."""
        if self.best is None:
            return []
        found: dict[Choice, Neighbour] = {}
        for key, ones in neighbours(self.space, self.best.choice).items():
            for near in ones:
                planned = self.plan(near.choice)
                if planned is not None and near.choice not in found:
                    found[near.choice] = Neighbour(key, near, planned, reason(self.best, planned))
        return [*found.values()]

    @cached_property
    def ranked(self) -> list[Planned]:
        """The best layout of each mesh (tensor, pipeline, context), the best mesh first."""
        if self.best is None:
            return []
        found: Counter[Mesh] = Counter()
        for one in self.rough:
            mesh = one.passes.mesh
            if found[mesh] < EACH_MESH:
                found[mesh] += any(True for _ in self.fitting([one.choice]))
            if self._is_enough or sum(number >= EACH_MESH for number in found.values()) >= RANKED:
                break
        best: dict[tuple[int, int, int], Planned] = {}
        for planned in self.planned:
            choice = planned.choice
            best.setdefault((choice.tensor, choice.pipeline, choice.context), planned)
        return [*best.values()][:RANKED]

    @cached_property
    def front(self) -> list[Planned]:
        """The layouts than which none is both faster and smaller, the fastest first."""
        if self.best is None:
            return []
        most = SLOWEST * self.best.seconds
        rough = [*_front([one for one in self.rough if one.seconds <= most], lambda one: one.num_bytes)]
        step = max(1, len(rough) // ON_FRONT)
        for _ in self.fitting(one.choice for one in [*rough[::step], *rough[-1:]]):
            pass
        bearable = sorted((one for one in self.planned if one.seconds <= most), key=lambda one: one.seconds)
        return [*_front(bearable, lambda one: one.num_bytes)]


def _front(sorted_by_time: Sequence[T], size: Callable[[T], float]) -> Iterator[T]:
    """Yield those that are smaller than all faster ones."""
    smallest = math.inf
    for one in sorted_by_time:
        if size(one) < smallest:
            smallest = size(one)
            yield one
