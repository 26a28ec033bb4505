"""The items of a memory plan: what is held, where, and during which part of a step. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum

GIB = 1 << 30


class Place(Enum):
    """The memory that holds an item."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


class Phase(Enum):
    """The part of a step that an item is held in. Activations and the temporaries of the update are
    never there together."""

    ALWAYS = "always"
    BACKWARD = "forward and backward"
    UPDATE = "update"


@dataclass(frozen=True)
class Item:
    """A part of a rank's memory [bytes]. `note`: how the bytes come about."""

    name: str
    num_bytes: int
    place: Place = Place.DEVICE
    phase: Phase = Phase.ALWAYS
    note: str = ""


def peak(items: Iterable[Item], place: Place) -> int:
    """Return the bytes in one memory at the worst moment of a step."""
    held = dict.fromkeys(Phase, 0)
    for item in items:
        if item.place is place:
            held[item.phase] += item.num_bytes
    return held[Phase.ALWAYS] + max(held[Phase.BACKWARD], held[Phase.UPDATE])


def held_at(items: Iterable[Item], places: Container[Place], phase: Phase) -> list[Item]:
    """Return the items that are in some memories during a part of a step, the largest first; those
    of one name in one memory together."""
    sizes: Counter[tuple[str, Place]] = Counter()
    for item in items:
        if item.place in places and item.phase in (Phase.ALWAYS, phase):
            sizes[item.name, item.place] += item.num_bytes
    return [Item(name, num_bytes, place) for (name, place), num_bytes in sizes.most_common() if num_bytes]


def total(items: Iterable[Item], *names: str, place: Place | None = None) -> int:
    """Return the bytes of the items with these names, in one memory or in all."""
    return sum(item.num_bytes for item in items if item.name in names and place in (None, item.place))
