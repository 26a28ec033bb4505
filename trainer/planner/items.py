"""The items of a memory plan: what is held, where, and during which part of a step. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


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


def total(items: Iterable[Item], *names: str, place: Place | None = None) -> int:
    """Return the bytes of the items with these names, in one memory or in all."""
    return sum(item.num_bytes for item in items if item.name in names and place in (None, item.place))
