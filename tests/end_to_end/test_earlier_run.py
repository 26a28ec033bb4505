"""A run of an earlier version goes on: its folder, its checkpoint and the commands of its queued jobs.

`earlier_run/` was written by commit ededee9: two ranks, ZeRO-1, three of six steps, and the records of
all six.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.campaign.cases import digests
from tools.campaign.ranks import run_ranks, train
from trainer.track import read_metrics

EARLIER = Path(__file__).parent / "earlier_run"
STEP = 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The earlier run's folder of work, as it was when the run was ended."""
    for name in ("corpus.txt", "recipe.json"):
        shutil.copy(EARLIER / name, tmp_path)
    shutil.copytree(EARLIER / "run", tmp_path / "runs" / "earlier")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("ranks", "keys"), [(2, ()), (1, ()), (2, ("parallel.tensor=2", "zero.stage=0"))])
def test_it_goes_on_with_the_same_numbers(folder: Path, ranks: int, keys: tuple[str, ...]) -> None:
    run = folder / "runs" / "earlier"
    expected = [(record["loss"], record["grad_norm"]) for record in read_metrics(run / "metrics.jsonl")]
    command = ["recipe.json", *(word for key in keys for word in ("--set", key))]
    ended = run_ranks(train, command, world_size=ranks, log=folder / "log")
    assert ended.codes == (0,) * ranks, ended.said
    assert f"resumed after step {STEP}" in ended.said
    found = [(record["loss"], record["grad_norm"]) for record in read_metrics(run / "metrics.jsonl")]
    # The checkpoint is read exactly; other processors, and other layouts, sum in another order (fp32).
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)


def test_its_tensors_are_read_to_the_bit() -> None:
    """The digests are those that the earlier version read."""
    assert digests(EARLIER / "run" / "checkpoints" / f"step-{STEP:08d}") == json.loads((EARLIER / "digests.json").read_text())


def test_the_script_of_a_queued_job_finds_its_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "trainer.requeue", "--help"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert "--run-dir" in ended.stdout


def test_the_records_are_those_of_a_run() -> None:
    records = read_metrics(EARLIER / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert json.loads((EARLIER / "run" / "recipe.json").read_text())["run"]["name"] == "earlier"
