"""The notebook runs from its first cell to its last, and what `trainer` says may be called can be."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.end_to_end.runs import start, write_recipe
from trainer.cli import main
from trainer.errors import UserError
from trainer.recipe import load

NOTEBOOK = Path(__file__).parents[2] / "tools" / "first_hour.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_it_is_kept_without_what_a_run_left_in_it() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in cells()}) == len(cells())
    for cell in cells():
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
        for link in re.findall(r"\]\((.*?)\)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.grid  # three commands that each import torch, and a training
def test_its_cells_run(tmp_path: Path) -> None:
    program = "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    (tmp_path / "cells.py").write_text(program)
    ended = start(sys.executable, "cells.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "It is 14." in ended.stdout, ended.stdout
    (row,) = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    assert answers[0] == "It is 18."
    assert re.fullmatch(r"That is \d+\.", answers[1])
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)", ended.stdout, re.MULTILINE)]
    assert losses[-1] < losses[0] / 4


def test_what_trainer_says_may_be_called_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of the list is called by the notebook, and by the tests of exports and of adapters."""
    said = set(re.findall(r"`(trainer(?:\.\w+)+)", str(trainer.__doc__)))
    assert said == {
        *("trainer.cli.main", "trainer.recipe.load", "trainer.track.read_metrics", "trainer.checkpoint.export.export"),
        *("trainer.tuning.bottleneck_format.load_bottlenecks", "trainer.errors.UserError"),
    }
    recipe = write_recipe(tmp_path)
    assert load(str(recipe), ["train.steps=10"]).recipe.train.steps == 10
    with pytest.raises(UserError) as caught:
        load(str(recipe), ["train.step=10"])
    assert "did you mean train.steps" in caught.value.lines[0]
    assert main(["check", str(recipe)]) == 0
    code = "import sys, trainer.cli, trainer.recipe, trainer.track; sys.exit('torch' in sys.modules)"
    assert start(sys.executable, "-c", code, cwd=tmp_path).returncode == 0
