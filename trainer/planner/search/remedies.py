"""The changes with which a recipe fits its device, and what they cost in time. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.model.config import TransformerConfig
from trainer.planner.prediction import MEMORY_BAND, Prediction
from trainer.planner.search.choice import Choice, as_words
from trainer.planner.search.find import Search
from trainer.planner.search.near import roughly_near
from trainer.planner.search.planned import Planned
from trainer.planner.search.reasons import percent
from trainer.planner.search.rough import Rough, Roughly
from trainer.recipe import ResolvedRecipe

GIB = 1 << 30
SHOWN = 3
MOST_CHANGED = 3
TRIED = 40  # layouts that are planned for the changes of one, of two or of three keys


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


def remedies(resolved: ResolvedRecipe, network: TransformerConfig, prediction: Prediction, shown: int = SHOWN) -> list[Remedy]:
    """Return the cheapest changes of as few keys as possible with which a plan fits its device; []
    where no change of a few keys does."""
    assert prediction.device is not None, "only a plan for a device can be refused"
    if prediction.time is None:
        return []
    search = Search(resolved, network, prediction.layout.world_size, prediction.device)
    own = Choice.of(resolved.recipe)
    of_keys: dict[int, dict[tuple[str, ...], list[Rough]]] = {}
    roughly = Roughly(search.space, prediction.device, (1 + MEMORY_BAND) * prediction.device.memory)
    for changed, one in roughly_near(roughly, own, MOST_CHANGED):
        of_keys.setdefault(len(changed), {}).setdefault(changed, []).append(one)
    found: list[Remedy] = []
    for number in sorted(of_keys):
        fits = sorted(_fastest_of_each(search, of_keys[number]), key=lambda one: one.order)
        for planned in fits[: shown - len(found)]:
            settings = tuple(planned.choice.settings(resolved))
            found.append(Remedy(planned, settings, planned.seconds / prediction.time.total - 1))
    return found


def _fastest_of_each(search: Search, of_keys: dict[tuple[str, ...], list[Rough]]) -> Iterator[Planned]:
    """Yield, for each set of changed keys, the fastest layout that surely fits."""
    ordered = sorted(
        (one.seconds, changed, number, one) for changed, ones in of_keys.items() for number, one in enumerate(ones)
    )
    done: set[tuple[str, ...]] = set()
    for _, changed, _, one in ordered[: TRIED * SHOWN]:
        if changed in done or len(done) == SHOWN:
            continue
        for planned in search.fitting([one.choice]):
            if planned.prediction.fits:
                done.add(changed)
                yield planned
