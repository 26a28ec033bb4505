"""A process that has joined the others of its run: the first step of training, of an evaluation and
of `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from parallel.mesh import Mesh
from parallel.messages import Messages
from parallel.topology import Layout
from trainer.launch import ranks
from trainer.launch.ranks import Neighbour, Place
from trainer.recipe.batch_plan import layout_of
from trainer.schema import Parallel
from trainer.stopwatch import Stopwatch
from trainer.watchdog.lost import among_strangers


@dataclass(frozen=True)
class Joined:
    """A rank that can communicate with all others. `timeout`: how long a collective may take."""

    place: Place
    timeout: timedelta
    neighbour: Neighbour | None
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "watch", Stopwatch(self.place.device))

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def is_first(self) -> bool:
        """Return whether this is the rank that writes the files and the console."""
        return self.place.is_first

    def layout(self, degrees: Parallel) -> Layout:
        """Return the layout of all ranks. RecipeError if they do not divide by the degrees."""
        return layout_of(degrees, self.place.world_size, self.place.how)

    def mesh(self, degrees: Parallel) -> Mesh:
        """Return this rank's groups, which all ranks make together."""
        return Mesh.build(self.layout(degrees), self.timeout)

    def messages(self) -> Messages:
        """Return a new channel for messages to all ranks, which they open together."""
        return Messages.among_all(self.timeout)


@contextmanager
def joined(place: Place, timeout: timedelta) -> Iterator[Joined]:
    """Join the ranks, and leave them at the end of the block, also after an exception. If a rank is
    lost while they meet, the others end with its name."""
    with among_strangers(place.rank), ranks.joined(place, timeout) as neighbour:
        yield Joined(place, timeout, neighbour)
