"""W&B on nodes without a network: the console names what `wandb sync` takes, and a run that goes on is the same one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import start, write_recipe
from tests.unit.wandb_files import history, records

pytestmark = pytest.mark.timeout(240)


def train(recipe: Path, steps: int, home: Path) -> Path:
    """The folder that the console names for `wandb sync`."""
    command = (sys.executable, "-m", "trainer", "train", str(recipe), "--set", f"train.steps={steps}")
    done = start(*command, cwd=recipe.parent, HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    (named,) = re.findall(r"W&B: run kept offline; upload it with: wandb sync (\S+)", done.stdout)
    return Path(named)


def read(folder: Path) -> tuple[str, list[Any]]:
    """(run id, training steps) of an offline run."""
    (path,) = folder.glob("*.wandb")
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    return run.run_id, [row["step"] for row in history(path) if "train/loss" in row]


@pytest.mark.grid  # 20 s
def test_two_starts_are_one_run_in_two_folders_that_sync_takes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tracking__wandb={"mode": "offline"}, train__sample_prompt=None, train__steps=2)
    first, second = train(recipe, 2, tmp_path / "home"), train(recipe, 4, tmp_path / "home")
    kept = tmp_path / "runs" / "small" / "wandb"
    assert sorted(kept.glob("offline-run-*")) == sorted({first, second})
    (run_id, steps), (same_id, more_steps) = read(first), read(second)
    assert (run_id, steps, more_steps) == (same_id, [1, 2], [3, 4])
    sync = start("wandb", "sync", "--dry-run", *map(str, (first, second)), cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert sync.returncode == 0, sync.stdout + sync.stderr
    said = sync.stdout + sync.stderr
    assert all(folder.name in said for folder in (first, second)), said
