"""The folder of a run: what is where in it, and who may write there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.durable import write_json
from trainer.errors import RecipeError
from trainer.redaction import redact
from trainer.sections import Recipe


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files; see the README's table. What is written here is without secrets: such folders are shared, mailed
    and archived."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, run_dir: str | None) -> RunFolder:
        """`run_dir`: the command line's, in place of run.dir/run.name."""
        return cls(Path(run_dir) if run_dir else Path(recipe.run.dir) / recipe.run.name)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def holds_a_run(self) -> bool:
        return self.metrics.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run that is here came to its end: it has closed its history, and left its report, the last of all."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return "ended_by" not in summary and self.report.exists()

    def create(self) -> None:
        """RecipeError when it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"run folder {self.path}: {error.strerror}: set run.dir to a folder that can be written"
            ) from error

    def move_aside(self) -> Path:
        """Give an older run of this name another one, so that nothing of it is lost; where it is now."""
        names = (self.path.with_name(f"{self.path.name}.before-{n}") for n in range(1, 10_000))
        aside = next(path for path in names if not path.exists())
        self.path.rename(aside)
        return aside

    def write_given(self, recipe: Mapping[str, Any]) -> None:
        """The recipe as its author wrote it, after `extends` and `--set`."""
        write_json(self.path / "recipe.json", redact(recipe))

    def write_resolved(self, resolved: Mapping[str, Any]) -> None:
        """Every value with its origin, and the exact dict that DeepSpeed got."""
        write_json(self.resolved, redact(resolved))
