"""Event files, read back by TensorBoard's own accumulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.track.run_info import RunInfo
from trainer.track.tensorboard import TensorBoardTracker


def info(folder: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(name="r", folder=folder, recipe={}, total_steps=9, world_size=1, devices="CPU", start_step=start_step)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def attempt(folder: Path, start_step: int, steps: range, loss: float) -> None:
    tracker = TensorBoardTracker()
    tracker.start(info(folder, start_step))
    for step in steps:
        tracker.log({"step": step, "loss": loss, "mfu": None, "time": 1.7e9 + step})
    tracker.evaluate({"step": steps[-1], "eval_loss": 0.25})
    tracker.finish({})


def test_scalars_read_back(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 4), loss=0.5)
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(tmp_path, "eval/loss") == [(3, 0.25)]


def test_a_resumed_run_shows_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(tmp_path, 0, range(1, 6), loss=0.5)
    monkeypatch.setattr("trainer.track.tensorboard.time.time", lambda: 4e9)  # files are ordered by their second
    attempt(tmp_path, 3, range(4, 7), loss=0.75)
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.75), (5, 0.75), (6, 0.75)]


def test_neither_tensorflow_nor_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.track.tensorboard import *\n"
        "t = TensorBoardTracker()\n"
        f"t.start(RunInfo(name='r', folder=Path({str(tmp_path)!r}), recipe={{}}, total_steps=1, world_size=1, devices=''))\n"
        "t.log({'step': 1, 'loss': 1.0}); t.finish({})\n"
        "assert not {'torch', 'tensorflow', 'wandb', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
