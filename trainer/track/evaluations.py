"""The evaluations of a run so far, and how many of them in a row found nothing better. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.model.measures import Aim
from trainer.recipe.best import aim_of
from trainer.schema import Recipe
from trainer.track.jsonl import Number, read_metrics
from trainer.track.text import short

Record = Mapping[str, Number]


@dataclass
class Evaluations:
    """The records of `evaluations.jsonl`, in the order of their steps, the same on every rank."""

    records: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Evaluations:
        """Read the file; none of it if it is not there. DataError if it is damaged."""
        return cls([*read_metrics(path)])

    def add(self, record: Record) -> None:
        self.records.append(record)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`."""
        self.records = [record for record in self.records if (record["step"] or 0) <= step]

    def of(self, step: int) -> dict[str, Number]:
        """Return the figures that were measured after `step`; {} if none were."""
        last = next((record for record in reversed(self.records) if (record["step"] or 0) <= step), None)
        if last is None or last["step"] != step:
            return {}
        return {name: value for name, value in last.items() if name != "step"}

    def idle(self, aim: Aim) -> int:
        """Return how many evaluations in a row, up to the last one, were no better than the best
        before them."""
        best, idle = None, 0
        for record in self.records:
            value = aim.value(record)
            if aim.improves(value, best):
                best, idle = value, 0
            else:
                idle += 1
        return idle

    def best(self, aim: Aim) -> tuple[int, float] | None:
        """Return the step of the best evaluation, the first of equal ones, and its figure; None if
        there is none."""
        best: tuple[int, float] | None = None
        for record in self.records:
            value = aim.value(record)
            if value is not None and aim.improves(value, best[1] if best else None):
                best = int(record["step"] or 0), value
        return best


def out_of_patience(recipe: Recipe, evaluations: Evaluations) -> str:
    """Return the reason for which train.patience ends a run now; "" while it goes on."""
    patience = recipe.train.patience
    if patience is None:
        return ""
    aim = aim_of(recipe)
    if (idle := evaluations.idle(aim)) < patience:
        return ""
    best = evaluations.best(aim)
    than = f" than {short(best[1], 5)} of step {best[0]}" if best else ""
    return (
        f"{idle} evaluation{'s' if idle > 1 else ''} in a row without a better {aim.figure}{than} (train.patience {patience})"
    )
