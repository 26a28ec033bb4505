"""The folder of a run: the files in it, and who may write there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic reads typing's own from Python 3.12 on
)

from pydantic import with_config
from typing_extensions import TypedDict

from trainer.errors import DataError, RecipeError
from trainer.files.decoding import OPEN, decode, read_as
from trainer.files.durable import write_json
from trainer.files.reading import read_json, told
from trainer.redaction import redact
from trainer.schema import Recipe

LOCK = ".lock"  # held by the first rank of the start that writes in the folder


@with_config(OPEN)
class Entry(TypedDict):
    """A value of the recipe with its origin."""

    value: Any
    origin: str


@with_config(OPEN)
class Resolved(TypedDict):
    """The content of `resolved.json`."""

    values: dict[str, Entry]
    deepspeed_config: NotRequired[dict[str, Any] | None]


# Those of its values that something is computed with.
Computed = TypedDict(
    "Computed",
    {"description": str, "train.steps": int, "train.clip_norm": int | float, "checkpoint.every": int},
    total=False,
)


@with_config(OPEN)
class SourcePart(TypedDict):
    """An entry of `data-read.json`: a source's training part, or what was held out of it.

    `part`: "train" or "held out". `noun`: the word for its documents.
    """

    source: str
    part: str
    noun: str
    documents: int
    tokens: int


def read_data(path: Path) -> list[SourcePart]:
    """Return the content of a data-read.json; [] where there is none, as in runs of earlier
    versions. DataError if it is damaged."""
    try:
        return read_as(list[SourcePart], path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({told(error)}): remove it") from error


def read_resolved(path: Path) -> Resolved:
    """Return the content of a resolved.json. RecipeError if it is not there, DataError if it is
    damaged."""
    if not path.exists():
        raise RecipeError(f"{path.parent}: not a run folder, it has no {path.name}: give run.dir/run.name")
    try:
        resolved = read_as(Resolved, path)
        computed = {key: entry["value"] for key, entry in resolved["values"].items() if key in Computed.__annotations__}
        decode(Computed, computed)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({told(error)}): restore it") from error
    return resolved


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files; trainer/track/README.md says what is in each.

    What is written here is without secrets, because such folders are shared, mailed and archived.
    """

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, run_dir: str | None) -> RunFolder:
        """Return the folder of a recipe. `run_dir`: the one from the command line, in place of
        run.dir/run.name."""
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
    def data(self) -> Path:
        return self.path / "data-read.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def translating(self) -> Path:
        """The model whose translations are being measured; it is gone afterwards."""
        return self.path / "translating"

    @property
    def micro_batch(self) -> Path:
        """The micro-batch that was found for the devices of the run."""
        return self.path / "micro-batch.json"

    @property
    def compilation(self) -> Path:
        """The choice to compile the steps of the run, and the reason."""
        return self.path / "compilation.json"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def replaced_whole(self) -> tuple[Path, ...]:
        """The folders that are removed when the run writes them anew."""
        return (self.export, self.reference, self.translating)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def holds_a_run(self) -> bool:
        return self.metrics.exists()

    @property
    def finished_step(self) -> int | None:
        """The step with which the run here came to its end: it closed its history, and wrote its
        report, which comes last. None if it did not."""
        try:
            summary = read_json(self.path / "summary.json")
        except (OSError, ValueError):
            return None
        if not isinstance(summary, dict) or "ended_by" in summary or not self.report.exists():
            return None
        step = summary.get("steps")
        return step if isinstance(step, int) else None

    def create(self) -> None:
        """Create the folder. RecipeError if that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"run folder {self.path}: {told(error)}: set run.dir to a folder that can be written") from error

    def move_aside(self) -> Path:
        """Rename an older run of this name, so that nothing of it is lost, and return its new
        path."""
        whole = self.path.absolute()  # "." has no name
        names = (whole.with_name(f"{whole.name}.before-{n}") for n in range(1, 10_000))
        aside = next(path for path in names if not path.exists())
        whole.rename(aside)
        return aside

    def write_given(self, recipe: Mapping[str, Any]) -> None:
        """Write the recipe as its author wrote it, after `extends` and `--set`."""
        write_json(self.path / "recipe.json", redact(recipe))

    def write_data(self, parts: Sequence[SourcePart]) -> None:
        """Write what the sources held."""
        write_json(self.data, redact(list(parts)))

    def write_resolved(self, resolved: Mapping[str, Any]) -> None:
        """Write every value with its origin, and the exact dict that DeepSpeed got."""
        write_json(self.resolved, redact(resolved))
