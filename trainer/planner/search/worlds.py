"""The cost of each number of devices: the best layout on it, or why there is none. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.items import GIB
from trainer.planner.search.find import Search
from trainer.planner.search.planned import Planned
from trainer.planner.search.rough import Roughly
from trainer.recipe import ResolvedRecipe

BILLION = 1e9
PLANNED = 24  # layouts that are planned for each number of devices
MOST_WORLDS = 64  # in a table: each takes a second or more
# The table without --gpus ends where a device does less than this share of what the best one does.
EFFICIENT = 0.5
LARGEST = 1 << 20


@dataclass(frozen=True)
class World:
    """A number of devices, with the best layout on it. `why`: why there is none; "" if there is."""

    world_size: int
    best: Planned | None
    why: str

    @property
    def device_hours_per_billion(self) -> float | None:
        """The hours of all devices together for a billion tokens."""
        return self.world_size * BILLION / self.best.tokens_per_s / 3600 if self.best else None

    @property
    def tokens_per_s_each(self) -> float | None:
        return self.best.tokens_per_s / self.world_size if self.best else None


def read_worlds(text: str) -> list[int]:
    """Return the numbers of --gpus: 8, or 24..32, or 8,16,32. ValueError if it is none of these."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,6})(?:\.\.([1-9]\d{0,6}))?", part.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not a number of GPUs: legal are 8, 24..32 and 8,16,32")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{text!r}: {part.strip()} ends before it begins")
        if last - first >= MOST_WORLDS:
            raise ValueError(f"{text!r} is more than {MOST_WORLDS} numbers of GPUs")
        found += range(first, last + 1)
    if len(found) > MOST_WORLDS or max(found) > LARGEST:
        raise ValueError(f"{text!r}: legal are up to {MOST_WORLDS} numbers of GPUs, each up to {LARGEST:,}")
    return sorted(set(found))


def worlds(resolved: ResolvedRecipe, network: TransformerConfig, sizes: Sequence[int], device: Device) -> Iterator[World]:
    """Yield what each number of devices costs."""
    for size in sizes:
        yield world(resolved, network, size, device)


def doubling(resolved: ResolvedRecipe, network: TransformerConfig, device: Device) -> Iterator[World]:
    """Yield what one node costs, two, four and so on, up to the number on which a device does less
    than half of what it does on the best one, or that nothing can be divided over."""
    most, size = 0.0, device.per_node
    limit = min(LARGEST, resolved.recipe.batch.global_sequences * network.num_layers * network.num_heads)
    while size <= limit:
        found = world(resolved, network, size, device)
        each = found.tokens_per_s_each
        if most and each is None:
            yield found
            return
        yield found
        if each is not None and each < EFFICIENT * most:
            return
        most = max(most, each or 0.0)
        size *= 2


def world(resolved: ResolvedRecipe, network: TransformerConfig, size: int, device: Device) -> World:
    search = Search(resolved, network, size, device, most_planned=PLANNED)
    return World(size, search.best, "" if search.best else why_none(search))


def why_none(search: Search) -> str:
    """Return why no layout is there: none divides what must be divided, or none fits."""
    recipe, size = search.space.base, search.world_size
    if not search.space.meshes:
        return (
            f"no layout divides it: {size:,} devices are tensor × pipeline × data, and the data-parallel degree must divide "
            f"batch.global_sequences {recipe.batch.global_sequences:,}"
        )
    everything = Roughly(search.space, search.device, float("inf")).of(search.space.passes)
    for one in sorted(everything, key=lambda one: one.num_bytes)[:PLANNED]:
        planned = search.plan(one.choice)
        if planned is not None:
            return f"does not fit: the smallest layout needs {planned.num_bytes / GIB:,.1f} GiB"
    return "the recipe's rules refuse every layout"


def require_one(search: Search) -> Planned:
    """Return the best layout. RecipeError if there is none."""
    if search.best is None:
        raise RecipeError(f"--gpus {search.world_size}: {why_none(search)}")
    return search.best
