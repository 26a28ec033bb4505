"""Runs beside each other: where each stands, what it reached, and the keys in which they differ. No
torch.

All of it is read from the run folders, so it is the same for runs that train, have ended, or were
killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import RecipeError, UserError
from trainer.files.locks import is_held
from trainer.model.measures import LOSS, Aim, figures_of
from trainer.redaction import redact
from trainer.run_folder import LOCK, RunFolder, read_resolved
from trainer.track.evaluations import Evaluations
from trainer.track.history import History
from trainer.track.jsonl import Summary, read_metrics, read_summary
from trainer.track.text import printable

DEPTH = 3  # folders below the one that is asked about: a sweep's tasks lie in a folder of their own
# keys that say where a run is, not what it trains
OF_THE_PLACE = ("run.name", "run.dir", "data.cache_dir", "description")


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it. `values`: dotted key → value, without secrets."""

    name: str
    folder: RunFolder
    values: Mapping[str, Any]
    history: History
    evaluated: Evaluations
    summary: Summary

    @classmethod
    def read(cls, path: Path, name: str) -> Run:
        """Read a run folder. RecipeError if it is none, DataError if its files are damaged."""
        folder = RunFolder(path)
        resolved = read_resolved(folder.resolved)
        values = {key: redact(entry.get("value"), key) for key, entry in resolved["values"].items()}
        history = History.of(read_metrics(folder.metrics))
        return cls(name, folder, values, history, Evaluations.read(folder.evaluations), read_summary(path))

    @property
    def evaluations(self) -> History:
        return History.of(self.evaluated.records)

    @property
    def state(self) -> str:
        """Say whether it trains, came to its end, or why it ended before."""
        if is_held(self.folder.path / LOCK):
            return "running"
        if not self.history.num_records:
            return "not begun"
        # A summary of fewer steps is an earlier start's.
        if self._logged_step > self._closed_step:
            return "cut off"
        if reason := self.summary.get("ended_by"):
            return f"ended by {printable(reason).splitlines()[0]}"
        return "ended by patience" if "ended_early" in self.summary else "finished"

    @property
    def step(self) -> int:
        """The last step that is known; a run may end between two that are logged."""
        return max(self._logged_step, self._closed_step)

    @property
    def _logged_step(self) -> int:
        return int(self.history.last("step") or 0)

    @property
    def _closed_step(self) -> int:
        return int(self.summary.get("steps") or 0)

    @property
    def total_steps(self) -> int | None:
        total = self.values.get("train.steps")
        return total if isinstance(total, int) else None

    @property
    def loss(self) -> float | None:
        """The mean training loss of the last records, a fiftieth of them but five at least."""
        last = self.history["loss"][-max(5, self.history.num_records // 50) :]
        finite = last[np.isfinite(last)]
        return float(finite.mean()) if finite.size else None

    @property
    def aim(self) -> Aim:
        """The figure by which its evaluations are compared: checkpoint.best, or the held-out
        loss."""
        known = figures_of(self.values.get("data.task") or "pretrain", len(self.values.get("data.classes") or ()) or 2)
        asked = str(self.values.get("checkpoint.best"))
        figure = asked if asked in known else LOSS
        return Aim(figure, known[figure])

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of its best evaluation, and the figure."""
        return self.evaluated.best(self.aim)

    @property
    def tokens_per_s(self) -> float | None:
        return self.history.median("tokens_per_s")


def runs_at(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders, each under its path below the folder that holds them
    all."""
    return [Run.read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def runs_below(top: Path) -> tuple[list[Run], list[str]]:
    """Return the runs in a folder and in those below it, by name, and a line for each that is
    damaged.

    RecipeError if the folder is missing or has none.
    """
    if not top.is_dir():
        raise RecipeError(f"{top}: no such folder: give the folder that holds run folders (run.dir)")
    runs, faults = [], []
    for path in sorted(_run_folders(top, DEPTH)):
        try:
            runs.append(Run.read(path, str(path.relative_to(top)) if path != top else path.resolve().name))
        except UserError as error:
            faults += error.lines
    if not runs and not faults:
        raise RecipeError(f"{top}: no run folder in it: give the folder that holds run folders (run.dir)")
    return runs, faults


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the value of each run, as JSON, for each key in which they differ; "–" where a run
    lacks the key."""
    keys = dict.fromkeys(key for run in runs for key in run.values if key not in OF_THE_PLACE)
    rows = {key: [_shown(run.values, key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "–"
    value = values[key]
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _run_folders(top: Path, depth: int) -> Iterator[Path]:
    if (top / "resolved.json").is_file():
        yield top
    elif depth:
        for child in top.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _run_folders(child, depth - 1)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return each path below the folder that holds them all."""
    whole = [path.resolve() for path in paths]
    above = os.path.commonpath([path.parent for path in whole]) if whole else ""
    return [path.relative_to(above).as_posix() for path in whole]
