"""The tool that holds the planner against runs of this machine, on one small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import start
from tests.unit import here_sheets
from tools.validate_here import lines_of


@pytest.mark.grid
def test_a_run_is_compared_with_its_plan(tmp_path: Path) -> None:
    sheet = here_sheets.content()
    sheet["measured"]["machine"] = {"device": "a processor", "host_cores": 2, "torch": "2.0", "host": "elsewhere"}
    here_sheets.write(tmp_path / "triaxis" / "here.json", **sheet)
    written = tmp_path / "rows.json"
    command = (sys.executable, "-m", "tools.validate_here", "--quick", "--json", str(written))
    done = start(*command, cwd=tmp_path, XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(written.read_text())["rows"]
    assert min(row["predicted_s"], row["measured_s"], row["measured_bytes"], row["slower"]) > 0
    assert "\n".join(lines_of(written)).strip() == done.stdout.strip()


def test_without_a_sheet_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = start(sys.executable, "-m", "tools.validate_here", cwd=tmp_path, XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 78
    assert done.stderr.strip().endswith("run `triaxis doctor --measure`")
