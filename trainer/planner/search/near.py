"""The layouts near a given one: those that differ in a key or two. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from trainer.planner.search.choice import Choice
from trainer.planner.search.rough import Rough, Roughly
from trainer.planner.search.space import Passes, Space

# Keys that may change along, where a change of another key needs it: fewer micro-batches for a
# schedule, another number of stages that the layers divide into.
GOES_ALONG = frozenset(
    ("virtual_stages", "schedule", "micro_sequences", "divides_tokens", "offload_optimizer", "offload_param")
)
MOST_CHANGED = 3


class Near(NamedTuple):
    """A layout that is near another: the keys in which it differs, and how far it is in all."""

    changed: tuple[str, ...]
    distance: float
    choice: Choice


def near(space: Space, centre: Choice, most: int = MOST_CHANGED) -> Iterator[Near]:
    """Yield the layouts that differ in at most so many keys, without the centre itself."""
    for passes in space.passes:
        if _passes_changed(passes, centre) > most:
            continue
        for schedule, virtual in space.pipelines(passes):
            for states in space.states(passes, schedule):
                choice = passes.choice(schedule, virtual, states)
                changed = tuple(choice.differing(centre))
                if 0 < len(changed) <= most:
                    yield Near(changed, len(changed) + _apart(choice, centre), choice)


def neighbours(space: Space, centre: Choice) -> dict[str, list[Near]]:
    """Return, by key, the nearest layout for each other value of that key; of numbers only for the
    next one below and above."""
    nearest: dict[tuple[str, object], Near] = {}
    for one in near(space, centre):
        for key in one.changed:
            if GOES_ALONG.issuperset(set(one.changed) - {key}):
                value = getattr(one.choice, key)
                if (key, value) not in nearest or one.distance < nearest[key, value].distance:
                    nearest[key, value] = one
    found: dict[str, list[Near]] = {}
    for (key, _), one in nearest.items():
        found.setdefault(key, []).append(one)
    return {key: _adjacent(key, ones, centre) for key, ones in found.items()}


def roughly_near(roughly: Roughly, centre: Choice, most: int) -> Iterator[tuple[tuple[str, ...], Rough]]:
    """Yield the rough figures of layouts that differ in at most so many keys, with these keys."""
    passes = [one for one in roughly.space.passes if _passes_changed(one, centre) <= most]
    for one in roughly.of(passes):
        changed = tuple(one.choice.differing(centre))
        if 0 < len(changed) <= most:
            yield changed, one


def _passes_changed(passes: Passes, centre: Choice) -> int:
    mesh = passes.mesh
    here = (mesh.tensor, mesh.pipeline, mesh.context, passes.micro, passes.divides, passes.recompute)
    there = (centre.tensor, centre.pipeline, centre.context, centre.micro_sequences, centre.divides_tokens, centre.recompute)
    return sum(one != other for one, other in zip(here, there, strict=True))


def _apart(choice: Choice, centre: Choice) -> float:
    """Return how far numbers are apart, as a part of a change."""
    pairs = (
        (getattr(choice, key), getattr(centre, key)) for key in ("tensor", "pipeline", "virtual_stages", "micro_sequences")
    )
    return sum(abs(math.log2(one / other)) for one, other in pairs) / 100


def _adjacent(key: str, ones: list[Near], centre: Choice) -> list[Near]:
    here = getattr(centre, key)
    if isinstance(here, str | bool) or key == "zero_stage":
        return sorted(ones, key=lambda one: str(getattr(one.choice, key)))
    by_value = {getattr(one.choice, key): one for one in ones}
    below = max((value for value in by_value if value < here), default=None)
    above = min((value for value in by_value if value > here), default=None)
    return [by_value[value] for value in (below, above) if value is not None]
