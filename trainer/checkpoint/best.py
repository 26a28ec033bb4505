"""The best checkpoint of a run by the figure that `checkpoint.best` names. No torch.

A checkpoint that is saved after an evaluation has the record of it in its manifest, under one
checksum and one rename with everything else. So which one is the best is read from the checkpoints
that are there. Nothing points to it, and nothing can be torn, stale or missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.errors import DataError
from trainer.model.measures import Aim
from trainer.recipe.best import aim_of, figures
from trainer.recipe.earlier import recipe_of
from trainer.redaction import redact
from trainer.schema import Recipe

# What decides, beside the model, which value a figure has: the facts, and the keys of a recipe.
FACTS = ("data.samples", "data.tokenizer")
DATA, TRAIN = {"eval_fraction", "eval_sources", "seq_len"}, {"eval_sequences"}


@dataclass(frozen=True)
class Best:
    """A step with its figure."""

    step: int
    value: float


@dataclass(frozen=True)
class Contest:
    """A comparison of checkpoints by a figure, among those that were evaluated on the same data."""

    aim: Aim
    basis: Mapping[str, Any]

    @classmethod
    def of(cls, recipe: Recipe, facts: Mapping[str, Any]) -> Contest | None:
        """Return the comparison that a recipe asks for; None without checkpoint.best."""
        return cls(aim_of(recipe), _basis(recipe, facts)) if recipe.checkpoint.best else None

    @classmethod
    def of_folder(cls, folder: CheckpointFolder) -> Contest | None:
        """Return the comparison that the newest checkpoint's recipe asks for."""
        for _, path in folder.steps():
            try:
                manifest = Manifest.read(path)
                recipe = recipe_of(path, manifest.recipe)
                return cls.of(recipe, manifest.facts) if recipe.checkpoint.best in figures(recipe) else None
            except DataError:
                continue
        return None

    def figure(self, checkpoint: Path, manifest: Manifest) -> float | None:
        """Return the figure of a checkpoint; None if it was not evaluated, or on other data."""
        value = self.aim.value(evaluation(manifest))
        if value is None or _basis(recipe_of(checkpoint, manifest.recipe), manifest.facts) != self.basis:
            return None
        return value

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
                value = self.figure(path, Manifest.read(path))
            except DataError:
                continue
            if value is not None:
                yield Best(step, value)


def evaluation(manifest: Manifest) -> Mapping[str, float | int]:
    """Return the figures that were measured after the checkpoint's last step; {} if none were."""
    found: Mapping[str, float | int] = manifest.state.get("memory", {}).get("evaluation", {})
    return found


def storable(record: Mapping[str, float | int | None]) -> dict[str, float | int]:
    """Return a record as a manifest can hold it: without what is not finite."""
    return {name: value for name, value in record.items() if value is not None and math.isfinite(value)}


def _basis(recipe: Recipe, facts: Mapping[str, Any]) -> dict[str, Any]:
    keys = recipe.model_dump(mode="json", include={"data": DATA, "train": TRAIN})
    return {**redact(keys), **{name: facts.get(name) for name in FACTS}}  # as a manifest has them
