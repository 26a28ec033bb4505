"""The folder of a run: what is where in it, and who may write there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files; see the README's table."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def create(self, recipe: Mapping[str, Any]) -> None:
        """Make the folder and write the recipe as given; RecipeError when a run is already there."""
        if self.metrics.exists():
            raise RecipeError(
                f"run folder {self.path} already holds a run: choose another run.name (--set run.name=NAME) or move the old one"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "recipe.json", recipe)
        except OSError as error:
            raise RecipeError(
                f"run folder {self.path}: {error.strerror}: set run.dir to a folder that can be written"
            ) from error

    def write_resolved(self, resolved: Mapping[str, Any]) -> None:
        """Every value with its origin, and the exact dict that DeepSpeed got."""
        write_json(self.path / "resolved.json", resolved)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
