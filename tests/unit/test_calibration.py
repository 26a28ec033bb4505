"""A run beside its plan: how it is shown, and the factor that its device's plans take from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_folders import SUMMARY, write_run
from trainer.cli import main
from trainer.files.paths import calibration_file
from trainer.planner.devices import device, listed
from trainer.run.plan_outcome import outcome
from trainer.track.plan_record import PlanRecord, line_of, rows_of
from trainer.track.report import write_report

GIB = 2**30
ROOT = Path(__file__).parents[2]


def record(**changes: Any) -> PlanRecord:
    whole: dict[str, Any] = {
        "device": "a100-80g",
        "calibration": 1.0,
        "predicted": {"memory_bytes": 40 * GIB, "step_time_s": 2.0},
        "measured": {"memory_bytes": 38 * GIB, "step_time_s": 2.5},
    }
    return PlanRecord(**{**whole, **changes})


def write(folder: Path, plan: PlanRecord | None) -> Path:
    return write_run(folder, 3, summary=SUMMARY | ({"plan": plan} if plan else {}))


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings"


def test_both_figures_are_shown_with_their_difference() -> None:
    assert line_of(record()) == (
        "plan: memory of a rank 40.00 GiB, measured 38.00 GiB (-5.0%); time of a step 2.00 s, measured 2.50 s (+25.0%)"
    )
    unknown = record(predicted={"memory_bytes": 40 * GIB, "step_time_s": None})
    assert line_of(unknown) == "plan: memory of a rank 40.00 GiB, measured 38.00 GiB (-5.0%)"
    assert [(row.planned, row.measured, row.difference) for row in rows_of(unknown)][1] == ("–", "2.50 s", "–")
    nothing = record(predicted={"memory_bytes": None, "step_time_s": None})
    assert line_of(nothing) == ""


def test_the_rank_that_took_most_counts() -> None:
    found = outcome(None, [(None, 5), (None, 9), (None, 7)], 0.5)
    assert found["measured"] == {"memory_bytes": 9, "step_time_s": 0.5}
    assert found["predicted"] == {"memory_bytes": None, "step_time_s": None}
    assert (found["device"], found["calibration"]) == (None, 1.0)


def test_the_report_has_them(tmp_path: Path) -> None:
    page = write_report(write(tmp_path / "run", record())).read_text()
    assert '<th scope="row" data-title="What">Time of a step</th>' in page
    assert '<td class="number" data-title="Difference">+25.0%</td>' in page
    assert 'id="plan"' not in write_report(write(tmp_path / "before", None)).read_text()


def test_a_run_gives_its_device_a_factor(tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", record())
    assert main(["plan", "--calibrate", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "took 2.50 s, planned 2.00 s; plans are now multiplied by 1.25, before by 1 (+25.0%)" in said
    assert device("a100-80g").calibration == 1.25
    assert listed("a100-80g").calibration == device("h200").calibration == 1.0
    again = write(tmp_path / "again", record(calibration=1.25, measured={"memory_bytes": 1, "step_time_s": 1.8}))
    assert main(["plan", "--calibrate", str(again)]) == 0
    assert "multiplied by 1.12, before by 1.25 (-10.0%)" in " ".join(capsys.readouterr().out.split())
    assert json.loads((settings / "triaxis" / "calibration.json").read_text())["a100-80g"]["run"] == str(again)
    large = str(ROOT / "ds_configs" / "llama_70b_3d.json")
    assert main(["plan", large, "--gpus", "64", "--device", "a100-80g"]) in (0, 78)
    assert "times of a100-80g are multiplied by 1.12, from" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--calibrate", "nowhere"], "--calibrate nowhere: no such folder: give the folder of a run"),
        (["--calibrate", "run"], "has no planned and measured time of a step: give a run that has ended"),
        (["recipe.json", "--calibrate", "run"], "a run has its own recipe: leave recipe.json out"),
        ([], "plan: give a RECIPE, or --calibrate and the folder of a finished run"),
    ],
)
def test_what_gives_no_factor_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", record(predicted={"memory_bytes": 1, "step_time_s": None}))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_damaged_file_is_one_line(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = calibration_file({"XDG_CONFIG_HOME": str(settings)})
    path.parent.mkdir(parents=True)
    path.write_text('{"a100-80g": {"factor": 0, "run": "x"}}')
    assert main(["plan", str(ROOT / "ds_configs" / "llama_70b_3d.json"), "--device", "a100-80g"]) == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibration.json: damaged (a100-80g.factor: input should be greater than 0): remove it" in line
