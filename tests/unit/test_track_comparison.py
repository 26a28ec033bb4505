"""Several runs beside each other: the list in the terminal, and the page."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.run_folders import SUMMARY, write_run
from trainer.cli import main
from trainer.files.locks import Lock, is_held
from trainer.run_folder import LOCK

ROOT = Path(__file__).parents[2]


def with_values(folder: Path, **values: object) -> Path:
    """Change resolved values of a run folder; `__` stands for a dot."""
    resolved = json.loads((folder / "resolved.json").read_text())
    for key, value in values.items():
        resolved["values"][key.replace("__", ".")] = {"value": value, "origin": "--set"}
    (folder / "resolved.json").write_text(json.dumps(resolved))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished run, one that a signal ended, and two tasks of a sweep, one of them killed."""
    top = tmp_path / "runs"
    write_run(top / "base", 60, summary=SUMMARY | {"steps": 60})
    write_run(top / "ended", 60, summary={"ended_by": "SIGUSR1", "steps": 60})
    with_values(write_run(top / "sweep" / "0", 60, summary=SUMMARY | {"steps": 60}), optimizer__lr=0.001)
    killed = write_run(top / "sweep" / "1", 60, tokens=lambda step: step * 32768)
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:40]))
    return top


def listed(top: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["runs", str(top), "--json"]) == 0
    return {row["run"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def test_the_list_has_every_run_with_its_state_and_best(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(runs, capsys)
    states = {"base": "finished", "ended": "ended by SIGUSR1", "sweep/0": "finished", "sweep/1": "cut off"}
    assert {name: row["state"] for name, row in rows.items()} == states
    assert (rows["sweep/1"]["step"], rows["sweep/1"]["steps"]) == (40, 60)
    evaluations = [json.loads(line) for line in (runs / "base" / "evaluations.jsonl").read_text().splitlines()]
    best = min(evaluations, key=lambda record: record["eval_loss"])
    assert rows["base"]["best"] == {"eval_loss": best["eval_loss"], "step": best["step"]}
    assert "hunter2" not in json.dumps(rows)


def test_a_run_that_ended_between_two_logged_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "patient", 60, summary={"ended_early": "no better eval_loss", "steps": 64})
    row = listed(tmp_path, capsys)["patient"]
    assert (row["state"], row["step"]) == ("ended by patience", 64)


def test_a_run_that_trains_is_running_and_looking_takes_nothing_from_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(runs / "base" / LOCK)
    assert lock.acquired(0.0)
    try:
        assert listed(runs, capsys)["base"]["state"] == "running"
    finally:
        lock.release()
    assert listed(runs, capsys)["base"]["state"] == "finished"
    assert not is_held(runs / "base" / LOCK)
    assert lock.acquired(0.0)
    lock.release()


def test_the_table_shows_only_the_keys_that_differ(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^sweep/0 .*optimizer\.lr=0\.001", said, re.MULTILINE)
    assert re.search(r"^base .*optimizer\.lr=0\.0006", said, re.MULTILINE)
    assert "zero.stage" not in said
    assert "data.cache_dir" not in said


def test_a_narrow_terminal_gets_a_block_for_each_run(runs: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "trainer", "runs", str(runs)]
    subprocess.run(words, stdout=theirs, stdin=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "base\r\n  state: finished\r\n  step: 60 of 60\r\n" in shown
    assert "  optimizer.lr: 0.0006\r\n" in shown


def test_a_damaged_run_is_one_line_and_the_others_are_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "ended" / "resolved.json").write_text("{")
    assert main(["runs", str(runs)]) == 65
    said = capsys.readouterr().out
    assert f"damaged: {runs / 'ended' / 'resolved.json'}: damaged (not JSON" in said.replace("\n", " ")
    assert "sweep/1" in said


def test_no_runs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "absent")]) == 78
    assert main(["runs", str(tmp_path)]) == 78
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": give")[0] for line in said] == [
        f"triaxis: error: {tmp_path / 'absent'}: no such folder",
        f"triaxis: error: {tmp_path}: no run folder in it",
    ]


def compared(folder: Path, *names: str, capsys: pytest.CaptureFixture[str]) -> str:
    page = folder / "page.html"
    assert main(["report", *(str(folder / name) for name in names), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    return page.read_text()


def test_the_page_has_curves_over_each_other_and_the_keys_that_differ(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = compared(runs, "base", "sweep/0", "sweep/1", capsys=capsys)
    plots = re.findall(r'id="plot-([\w-]+)"', page)
    # The tasks see different numbers of tokens in a step, so the loss is drawn by tokens too.
    assert plots == ["loss", "eval_loss", "eval_loss_tokens", "grad_norm", "lr", "tokens_per_s", "memory_gib"]
    loss = page[page.index('id="plot-loss"') : page.index('id="plot-eval_loss"')]
    for run in (1, 2, 3):
        assert f"var(--run-{run})" in loss
    assert "Training loss of sweep/1: " in loss
    keys = re.findall(r"<code>([\w.]+)</code></th>(.*?)</tr>", page)
    assert [key for key, _ in keys] == ["optimizer.lr"]
    assert re.findall(r'data-title="([\w/]+)">([\d.]+)<', keys[0][1]) == [
        ("base", "0.0006"),
        ("sweep/0", "0.001"),
        ("sweep/1", "0.0006"),
    ]
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "#a000" not in page
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) <= set(re.findall(r"--([a-z0-9-]+):", page))


def test_the_page_leads_to_the_reports_and_is_the_same_for_the_same_runs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "base" / "report.html").write_text("a page")
    page = compared(runs, "base", "ended", capsys=capsys)
    assert re.findall(r'href="([^"#]*)"', page) == ["base/report.html"]
    assert compared(runs, "base", "ended", capsys=capsys) == page


def test_a_file_of_somebody_else_is_not_replaced(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("three years of work")
    assert main(["report", str(runs / "base"), str(runs / "ended"), "--out", str(thesis)]) == 78
    assert "is no comparison of runs" in capsys.readouterr().err
    assert thesis.read_text() == "three years of work"
    assert main(["report", str(runs / "base"), "--out", str(thesis)]) == 78


def test_more_runs_than_can_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [write_run(tmp_path / str(number), 2) for number in range(25)]
    assert main(["report", *map(str, many), "--out", str(tmp_path / "page.html")]) == 78
    assert "25 runs: at most 24 can be told apart" in capsys.readouterr().err
    assert main(["report", *map(str, many[:24]), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert len(set(re.findall(r'class="swatch (dash-\d)" style="border-color: var\(--(run-\d)\)"', page))) == 24
