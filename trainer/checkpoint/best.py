"""The best checkpoint of a run by the figure that `checkpoint.best` names. No torch.

A checkpoint that is saved after an evaluation has the record of it in its manifest, with a
fingerprint of the data, under one checksum and one rename with everything else. So which one is the
best is read from the checkpoints that are there. Nothing points to it, and nothing can be torn,
stale or missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.errors import DataError
from trainer.model.measures import Aim
from trainer.recipe.best import aim_of, figures
from trainer.recipe.earlier import recipe_of
from trainer.schema import Recipe


@dataclass(frozen=True)
class Best:
    """A step with its figure."""

    step: int
    value: float


@dataclass(frozen=True)
class Contest:
    """A comparison of checkpoints by a figure, among those that were evaluated on the same data.
    `data`: its fingerprint."""

    aim: Aim
    data: str

    @classmethod
    def of(cls, recipe: Recipe, data: str) -> Contest | None:
        """Return the comparison that a recipe asks for; None without checkpoint.best."""
        return cls(aim_of(recipe), data) if recipe.checkpoint.best else None

    @classmethod
    def of_folder(cls, folder: CheckpointFolder) -> Contest | None:
        """Return the comparison that the newest checkpoint's recipe asks for."""
        for _, path in folder.steps():
            try:
                manifest = Manifest.read(path)
                recipe = recipe_of(path, manifest.recipe)
                return cls.of(recipe, _evaluated_on(manifest)) if recipe.checkpoint.best in figures(recipe) else None
            except DataError:
                continue
        return None

    def figure(self, manifest: Manifest) -> float | None:
        """Return the figure of a checkpoint; None if it was not evaluated, or on other data."""
        return self.aim.value(evaluation(manifest)) if _evaluated_on(manifest) == self.data else None

    def best(self, folder: CheckpointFolder) -> Best | None:
        """Return the best checkpoint whose manifest is intact, the first of equal ones; None if
        none was evaluated."""
        best: Best | None = None
        for found in self._figures(folder):
            if self.improves(found.value, best):
                best = found
        return best

    def improves(self, value: float | None, best: Best | None) -> bool:
        return self.aim.improves(value, best.value if best else None)

    def _figures(self, folder: CheckpointFolder) -> Iterator[Best]:
        for step, path in reversed(folder.steps()):
            try:
                value = self.figure(Manifest.read(path))
            except DataError:
                continue
            if value is not None:
                yield Best(step, value)


def evaluation(manifest: Manifest) -> Mapping[str, float | int]:
    """Return the figures that were measured after the checkpoint's last step; {} if none were."""
    found: Mapping[str, float | int] = _remembered(manifest).get("figures", {})
    return found


def to_remember(figures: Mapping[str, float | int | None], data: str) -> dict[str, Any]:
    """Return what a manifest remembers of an evaluation: the figures that are finite, {} without an
    evaluation, and the fingerprint of the data of all evaluations."""
    finite = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
    return {"data": data, "figures": finite}


def _evaluated_on(manifest: Manifest) -> str:
    return str(_remembered(manifest).get("data", ""))


def _remembered(manifest: Manifest) -> Mapping[str, Any]:
    found: Mapping[str, Any] = manifest.state.get("memory", {}).get("evaluation", {})
    return found
