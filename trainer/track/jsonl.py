"""The history of a run, kept by us: `metrics.jsonl`, `evaluations.jsonl` and `summary.json` in the run folder.

Training and evaluation records live in two files. `metrics.jsonl` promises one object per logged step with the same keys
in each, so that one line of pandas or jq reads it; evaluations come at other steps, after the record of their step is on
disk, with other keys. Merging them would mean holding records back (a kill loses them) or rewriting lines.

Floats are written by `repr`, which reads back bit-equal. JSON has no NaN or infinity: they are the strings "nan", "inf"
and "-inf", and `read_metrics` turns them back into floats. A record holds numbers only, so no other string can be meant.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trainer.durable import write_json
from trainer.errors import DataError
from trainer.redaction import redact
from trainer.track.run_info import RunInfo

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"

SYNC_EVERY_S = 5.0  # a power cut loses at most this much history; a kill loses nothing, each line is flushed

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Number = float | int | None


def to_json(value: Any) -> Any:
    """`value` with every non-finite float replaced by its name, ready for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


class MetricsFile:
    """Appends one JSON object per line. What a kill tore off at the end of the file is cut when it is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut_torn_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Number]) -> None:
        """One line, in the hands of the operating system when this returns."""
        self._file.write(json.dumps(to_json(record), allow_nan=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def rewind(self, step: int) -> None:
        """Without the records after `step`."""
        self._file.close()
        truncate_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Number]]:
    """The records of `metrics.jsonl` or `evaluations.jsonl`, in order; of one without a file, none.

    A last line without its newline was torn by a kill and is left out. Any other damage: DataError that names the line.
    """
    return [record for _, record in _read(path)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records after `step`, whole or not at all: a resumed run writes them again, so that each step appears once.

    The lines that stay keep their bytes.
    """
    if not path.exists():
        return
    kept = [line for line, record in _read(path) if _step(path, record) <= step]
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Number]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield line, _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Number]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not a JSON record ({error}): delete the line, or restore the file") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: expected one JSON object, found {type(record).__name__}: delete the line")
    for name, value in record.items():
        if isinstance(value, str):
            if value not in _NON_FINITE:
                raise DataError(f"{path}:{number}: {name} is {value!r}, not a number: correct or delete the line")
            record[name] = _NON_FINITE[value]
    return record


def _step(path: Path, record: Mapping[str, Number]) -> float:
    step = record.get("step")
    if step is None:
        raise DataError(f"{path}: a record without 'step': {json.dumps(to_json(record))[:200]}: delete the line")
    return step


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json`, {} before the run has finished. DataError when it is damaged."""
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): delete it; the report then does without") from error
    return {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in summary.items()}


class JsonlTracker:
    """The history on disk. Its failures are ours: a full disk is reported, not swallowed."""

    def start(self, run: RunInfo) -> None:
        self._folder = run.folder
        self._metrics = MetricsFile(run.folder / METRICS)
        self._evaluations = MetricsFile(run.folder / EVALUATIONS)

    def log(self, record: Mapping[str, Number]) -> None:
        self._metrics.append(record)

    def evaluate(self, record: Mapping[str, Number]) -> None:
        self._evaluations.append(record)

    def note(self, line: str) -> None:
        """Notes are for people; the history holds numbers."""

    def rewind(self, step: int) -> None:
        self._metrics.rewind(step)
        self._evaluations.rewind(step)

    def finish(self, summary: Mapping[str, object]) -> None:
        self._metrics.close()
        self._evaluations.close()
        write_json(self._folder / SUMMARY, redact(to_json(summary)))
