"""The history of a run, which we keep: `metrics.jsonl`, `evaluations.jsonl` and `summary.json` in
the run folder.

Training and evaluation records are in two files. `metrics.jsonl` promises one object per logged
step with the same keys in each, so that one line of pandas or jq reads it. Evaluations come at
other steps, with other keys, after the record of their step is on disk. Merging them would mean
holding records back (a kill loses them) or rewriting lines.

Floats are written by `repr`, which reads back bit-equal. JSON has no NaN or infinity: they are the
strings "nan", "inf" and "-inf", and `read_metrics` turns them back into floats. A record holds
numbers only, so no other string can be meant.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer.errors import DataError
from trainer.files.decoding import OPEN, decode
from trainer.files.durable import replacing_file, write_json
from trainer.files.reading import open_regular, open_to_append, read_json, told
from trainer.files.spare import Spare
from trainer.redaction import redact
from trainer.track.plan_record import PlanRecord
from trainer.track.run_info import RunInfo

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"

SYNC_EVERY_S = 5.0  # a power cut loses at most this much history; a kill nothing: lines are flushed

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Number = float | int | None
Shown = Annotated[int, Field(ge=-(2**63), le=2**63)] | float | None  # a number that can be shown


def to_json(value: Any) -> Any:
    """Return `value` with every non-finite float replaced by its name, ready for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


class MetricsFile:
    """A file to which one JSON object per line is appended.

    A torn line at its end, left by a kill, is cut when it is opened again. Records that a full disk
    does not take wait in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spare = Spare(path, "its records wait in memory for room")
        _cut_torn_line(path)
        self._open()
        self._waiting = b""
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Number], *, durable: bool = False) -> None:
        """Append one line. When this returns, the operating system has it, if the disk has room;
        with `durable` it is on disk, and a power cut does not take it."""
        self._waiting += json.dumps(to_json(record), allow_nan=False).encode() + b"\n"
        with self._spare.written():
            self._write()
            if durable or time.monotonic() - self._synced >= SYNC_EVERY_S:
                self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def rewind(self, step: int) -> None:
        """Remove the records after `step`."""
        self.close()
        truncate_after(self.path, step)
        self._open()

    def close(self) -> None:
        """Close the file. DataError if records are still waiting, because they are lost."""
        if self._file.closed:
            return
        try:
            self._write()
            self.sync()
        except OSError as error:
            lost = self._waiting.count(b"\n")
            raise DataError(
                f"{self.path}: {told(error)}: its last {lost} records are lost: make room there, and start the same command "
                "again"
            ) from error
        finally:
            self._file.close()

    def _open(self) -> None:
        self._file = open_to_append(self.path)
        self._end = os.fstat(self._file.fileno()).st_size  # the end of the last whole line

    def _write(self) -> None:
        """Write the waiting lines whole or not at all: a disk may take a part before it is full."""
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(self._waiting)
        self._waiting = b""


def read_metrics(path: Path) -> list[dict[str, Number]]:
    """Return the records of `metrics.jsonl` or `evaluations.jsonl`, in order; [] if there is no
    file.

    A last line without its newline was torn by a kill and is left out. DataError names the line of
    any other damage.
    """
    return [record for _, record in _read(path)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records after `step`, whole or not at all: a resumed run writes them again, so that
    each step appears once.

    The lines that stay keep their bytes.
    """
    if not path.exists():
        return
    kept = [line for line, record in _read(path) if (record["step"] or 0) <= step]
    with replacing_file(path) as file:
        file.writelines(kept)


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Number]]]:
    if not path.exists():
        return
    with io.BufferedReader(_opened(path)) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield line, _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Number]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a JSON record ({error}): delete the line, or restore the file") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: expected one JSON object, found {type(record).__name__}: delete the line")
    for name, value in record.items():
        if isinstance(value, str) and value in _NON_FINITE:
            record[name] = _NON_FINITE[value]
        elif not _is_number(value):
            raise DataError(f"{path}:{number}: {name} is {json.dumps(value)[:60]}, not a number: correct or delete the line")
    if not (type(record.get("step")) is int and record["step"] >= 0):
        raise DataError(f'{path}:{number}: a record without a whole number of steps under "step": delete the line')
    return record


def _is_number(value: object) -> bool:
    """Return whether a report can draw the value: float64 must be able to hold it."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def _opened(path: Path) -> FileIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {told(error)}: restore the file, or remove it") from error


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with _opened(path) as file:
        content = file.read()
    if (whole := content.rfind(b"\n") + 1) < len(content):
        os.truncate(path, whole)


@with_config(OPEN)
class Summary(TypedDict, total=False):
    """The entries of `summary.json` that are used for more than showing them."""

    ended_by: str
    ended_early: str
    devices: str
    sample_prompt: str
    sample: str
    steps: Shown
    best_step: Shown
    final_loss: Shown
    num_params: Shown
    wall_s: Shown
    skipped: Shown
    bleu: Shown
    chrf: Shown
    sacrebleu: str
    eval_perplexity: Shown
    unigram_perplexity: Shown
    plan: PlanRecord


def read_summary(folder: Path) -> Summary:
    """Return `summary.json`, or {} before the run has finished. DataError if it is damaged."""
    path = folder / SUMMARY
    if not path.exists():
        return {}
    try:
        summary = {name: _NON_FINITE.get(str(value), value) for name, value in read_json(path).items()}
        return decode(Summary, summary)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({told(error)}): delete it; the report then does without") from error


class JsonlTracker:
    """The tracker that keeps the history on disk. It waits for a full disk, and reports what could
    not be written by the end."""

    def start(self, run: RunInfo) -> None:
        self._folder = run.folder
        self._metrics = MetricsFile(run.folder / METRICS)
        self._evaluations = MetricsFile(run.folder / EVALUATIONS)

    def log(self, record: Mapping[str, Number]) -> None:
        self._metrics.append(record)

    def evaluate(self, record: Mapping[str, Number]) -> None:
        self._evaluations.append(record, durable=True)

    def note(self, line: str) -> None:
        """Do nothing: notes are for people, and the history holds numbers."""

    def rewind(self, step: int) -> None:
        self._metrics.rewind(step)
        self._evaluations.rewind(step)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write the summary and close the files. DataError if records are lost because the disk had
        no room to the end."""
        with Spare(self._folder / SUMMARY, "the run's summary is missing").written():
            write_json(self._folder / SUMMARY, redact(to_json(summary)))
        self._metrics.close()
        self._evaluations.close()
