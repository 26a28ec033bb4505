"""The changes with which a recipe fits its device, and what they cost in time. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.model.config import TransformerConfig
from trainer.planner.items import GIB
from trainer.planner.prediction import Prediction
from trainer.planner.search.choice import Choice, as_words
from trainer.planner.search.find import Search
from trainer.planner.search.near import roughly_near
from trainer.planner.search.planned import Planned
from trainer.planner.search.reasons import percent
from trainer.planner.search.rough import Rough, Roughly
from trainer.recipe import ResolvedRecipe

SHOWN = 3
MOST_CHANGED = 3
TRIED = 120  # layouts that are looked at
WORTH_A_KEY = 0.02  # the time that a change of another key must save


@dataclass(frozen=True)
class Remedy:
    """A change with which a recipe surely fits: its settings, and the time of a step against that
    of the recipe as it is."""

    planned: Planned
    settings: tuple[str, ...]
    slower: float

    @property
    def line(self) -> str:
        """The change as the command line takes it, the GiB that are left, and what it costs."""
        return f"{as_words(self.settings)}: {self.planned.num_bytes / GIB:,.1f} GiB, {percent(self.slower)} of time"


def remedies(resolved: ResolvedRecipe, network: TransformerConfig, prediction: Prediction) -> list[Remedy]:
    """Return the cheapest changes of a few keys with which a plan fits its device; [] where none
    does."""
    assert prediction.device is not None, "only a plan for a device can be refused"
    if prediction.time is None:
        return []
    search = Search(resolved, network, prediction.layout.world_size, prediction.device)
    own, found, done = Choice.of(resolved.recipe), [], list[frozenset[str]]()
    for changed, one in _cheapest_first(search, own)[:TRIED]:
        if any(keys <= set(changed) for keys in done):
            continue
        for planned in search.fitting([one.choice]):
            if planned.prediction.fits:
                done.append(frozenset(changed))
                slower = planned.seconds / prediction.time.total - 1
                found.append(Remedy(planned, tuple(planned.choice.settings(resolved)), slower))
        if len(found) == SHOWN:
            break
    return sorted(found, key=lambda one: one.slower)


def _cheapest_first(search: Search, own: Choice) -> list[tuple[tuple[str, ...], Rough]]:
    """Return the layouts near the recipe's that may fit, with the keys that they change; each
    further key counts as if it took more time."""
    roughly = Roughly(search.space, search.device, search.device.memory)
    near = enumerate(roughly_near(roughly, own, MOST_CHANGED))
    ordered = sorted(
        (one.seconds * (1 + WORTH_A_KEY * (len(changed) - 1)), number, changed, one) for number, (changed, one) in near
    )
    return [(changed, one) for _, _, changed, one in ordered]
