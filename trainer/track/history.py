"""The records of a run as columns, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.track.jsonl import Number

Column = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """Records as columns: float64, one element per record, NaN where a record has no such
    number."""

    columns: Mapping[str, Column]
    num_records: int

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Number]]) -> History:
        names = dict.fromkeys(name for record in records for name in record)
        # numpy turns None into NaN here.
        columns = {name: np.array([record.get(name) for record in records], dtype=np.float64) for name in names}
        return cls(columns, len(records))

    def __getitem__(self, name: str) -> Column:
        column = self.columns.get(name)
        return np.full(self.num_records, np.nan) if column is None else column

    def until(self, step: float | None) -> History:
        """Return the records up to `step`; all of them for None."""
        if step is None or not self.num_records:
            return self
        kept = self["step"] <= step
        return History({name: column[kept] for name, column in self.columns.items()}, int(kept.sum()))

    def has(self, name: str) -> bool:
        """Return whether any record has a finite number there."""
        return bool(np.isfinite(self[name]).any())

    def last(self, name: str) -> float | None:
        """Return the last record's number, NaN and infinity included; None if there is none."""
        return float(self[name][-1]) if self.num_records and name in self.columns else None

    def median(self, name: str) -> float | None:
        return float(np.median(self._finite(name))) if self.has(name) else None

    def largest(self, name: str) -> float | None:
        return float(self._finite(name).max()) if self.has(name) else None

    def _finite(self, name: str) -> Column:
        column = self[name]
        return column[np.isfinite(column)]
