"""metrics.jsonl: what is written reads back bit-equal, what a kill tore off is cut, what is damaged is named."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.track import read_metrics, truncate_after
from trainer.track.jsonl import JsonlTracker, MetricsFile, read_summary, to_json
from trainer.track.run_info import RunInfo


def write(path: Path, *records: dict) -> None:
    file = MetricsFile(path)
    for record in records:
        file.append(record)
    file.close()


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.floats())
def test_every_float_survives_strict_json_bit_equal(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("floats") / "metrics.jsonl"
    write(path, {"step": 1, "loss": value})
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(path)
    read = record["loss"]
    assert isinstance(read, float)
    assert bits(read) == bits(value) or (math.isnan(read) and math.isnan(value))


def test_numbers_keep_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 3, "loss": 0.1 + 0.2, "mfu": None, "skipped": 0})
    assert read_metrics(path) == [{"step": 3, "loss": 0.30000000000000004, "mfu": None, "skipped": 0}]


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1})
    assert read_metrics(path) == [{"step": 1}]
    file.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "{"])
def test_a_torn_last_line_is_left_out_and_cut_by_the_next_start(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 2})
    path.write_text(path.read_text() + torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not a JSON record"),
        ("[1]", "expected one JSON object"),
        ('{"step": 2, "loss": "low"}', "loss is .low., not a number"),
    ],
)
def test_other_damage_is_refused_by_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=told) as caught:
        read_metrics(path)
    assert f"{path}:2:" in caught.value.lines[0]
    assert len(caught.value.lines) == 1


def test_truncate_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 1.50}\n{"step":2,"loss":"nan"}\n'
    path.write_text(kept + '{"step": 3}\n{"step": 4}\n{"ste')
    truncate_after(path, 2)
    assert path.read_text() == kept
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    truncate_after(tmp_path / "absent.jsonl", 2)


def test_three_restarts_leave_each_step_once_from_the_last_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for attempt in range(4):
        truncate_after(path, 40 if attempt else 0)
        first = 41 if attempt else 1
        write(path, *({"step": step, "attempt": attempt} for step in range(first, 51)))
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(1, 51))
    assert [record["attempt"] for record in records] == [0] * 40 + [3] * 10


def test_a_truncation_that_meets_a_record_without_step_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 1.0}\n')
    with pytest.raises(DataError, match="without a whole number of steps"):
        truncate_after(path, 0)
    assert path.read_text() == '{"step": 1}\n{"loss": 1.0}\n'


def test_the_tracker_writes_three_files(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(RunInfo(name="r", folder=tmp_path, recipe={}, total_steps=2, world_size=1, devices="CPU"))
    tracker.log({"step": 1, "loss": 2.0})
    tracker.evaluate({"step": 1, "eval_loss": 1.5})
    tracker.finish({"final_loss": math.inf, "sample": "x"})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "evaluations.jsonl") == [{"step": 1, "eval_loss": 1.5}]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"final_loss": "inf", "sample": "x"}
    assert read_summary(tmp_path) == {"final_loss": math.inf, "sample": "x"}


def test_to_json_reaches_nested_values() -> None:
    assert to_json({"a": [math.nan, {"b": -math.inf}], "c": 1}) == {"a": ["nan", {"b": "-inf"}], "c": 1}


# ------------------------------------------------------------------------------------------------- a disk that is full

FULL = """
import os, resource, sys
from pathlib import Path
from trainer.errors import DataError
from trainer.track.jsonl import MetricsFile, read_metrics

file = MetricsFile(Path("metrics.jsonl"))
file.append({"step": 1, "loss": 2.5})
room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in range(2, 6):  # the disk fills within the record of step 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (70, most))
    file.append({"step": step, "loss": 2.5})
assert Path("metrics.jsonl").read_bytes().endswith(b"\\n"), "half a record was left"
print(len(read_metrics(Path("metrics.jsonl"))))
if sys.argv[1] == "room":
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    file.append({"step": 6, "loss": 2.5})
try:
    file.close()
except DataError as error:
    print(error)
print([record["step"] for record in read_metrics(Path("metrics.jsonl"))])
"""


@pytest.mark.parametrize("later", ["room", "none"])
def test_records_wait_for_room(later: str, tmp_path: Path) -> None:
    """A file system that takes 70 bytes: the system's limit of a file stands for a full disk, as its writes end alike."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, later],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    there, *said = done.stdout.splitlines()
    assert there == "2", "whole records that had room"
    assert done.stderr.count("metrics.jsonl: File too large: its records wait in memory for room; the run goes on") == 1
    if later == "room":
        assert said == ["[1, 2, 3, 4, 5, 6]"]
    else:
        assert "its last 3 records are lost: make room there" in said[0]
        assert said[1:] == ["[1, 2]"]
