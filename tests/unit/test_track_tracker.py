"""Who is told, in what order, and that a mirror's failure stays the mirror's."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from trainer.schema import Tracking
from trainer.track import CompositeTracker, NullTracker, RunInfo, make_tracker, open_rank_log
from trainer.track.console import ConsoleTracker
from trainer.track.text import duration, percent, printable, scaled, short, tick
from trainer.track.tracker import BestEffort


def run_info(folder: Path, total_steps: int = 100) -> RunInfo:
    return RunInfo(name="r", folder=folder, recipe={}, total_steps=total_steps, world_size=1, devices="1 CPU")


class Listener(NullTracker):
    """Remembers what it was told; fails on the calls that it was asked to fail on."""

    def __init__(self, *fails_on: str) -> None:
        self.heard: list[str] = []
        self._fails_on = fails_on

    def log(self, record: object) -> None:
        self._hear("log")

    def finish(self, summary: object) -> None:
        self._hear("finish")

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if what in self._fails_on:
            raise OSError(f"{what}: no space left")


def test_composite_finishes_all_then_raises_the_first_error() -> None:
    first, second, third = Listener("finish"), Listener("finish"), Listener()
    with pytest.raises(OSError, match="finish: no space left") as caught:
        CompositeTracker(first, second, third).finish({})
    assert [item.heard for item in (first, second, third)] == [["finish"]] * 3
    assert caught.traceback[-1].frame.f_locals["self"] is first


def test_a_failing_mirror_warns_once_and_is_left_alone() -> None:
    warnings: list[str] = []
    mirror = Listener("log")
    guarded = BestEffort("W&B", mirror, warnings.append)
    for step in range(3):
        guarded.log({"step": step})
    guarded.finish({})
    assert mirror.heard == ["log"]
    assert warnings == ["warning: W&B stopped (log: no space left); the run goes on, metrics.jsonl has the whole history"]


def test_our_own_history_is_not_best_effort(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_tracker(Tracking(), run_info(tmp_path / "absent"), writing_rank=True)


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(Tracking(tensorboard=True), run_info(tmp_path), writing_rank=False)
    tracker.log({"step": 1})
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []


def test_make_tracker_returns_it_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make_tracker(Tracking(tensorboard=True), run_info(tmp_path), writing_rank=True)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.finish({"final_loss": 2.0})
    assert {item.name for item in tmp_path.iterdir()} == {"metrics.jsonl", "evaluations.jsonl", "summary.json", "tensorboard"}
    assert "final loss" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- console


def console_output(*, terminal: bool, steps: int, clock: list[float], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    text = io.StringIO()
    tracker = ConsoleTracker(Console(file=text, force_terminal=terminal, width=120, highlight=False))
    monkeypatch.setattr("trainer.track.console.time.monotonic", lambda: clock[0])
    tracker.start(run_info(folder, steps))
    for step in range(1, steps + 1):
        clock[0] += 0.5
        tracker.log({"step": step, "loss": 3.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1234.0, "step_time_s": 0.5})
    tracker.evaluate({"step": steps, "eval_loss": 2.5, "eval_perplexity": 12.18, "eval_accuracy": 0.25})
    tracker.finish({"final_loss": 3.0, "wall_s": 75.0, "sample": "bell\x07\x1b[31m"})
    return text.getvalue()


def test_a_log_file_gets_few_plain_lines_with_the_first_and_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = console_output(terminal=False, steps=99, clock=[0.0], monkeypatch=monkeypatch, folder=tmp_path)
    steps = [int(line.split("/")[0].split()[1]) for line in out.splitlines() if line.startswith("step ") and "/" in line]
    assert steps[0] == 1
    assert steps[-1] == 99
    assert len(steps) == pytest.approx(99 * 0.5 / 2.0, abs=2)
    assert "ETA 47 s" in out.splitlines()[2]
    assert "step 99: eval loss 2.5, perplexity 12.18, accuracy 25.0 %" in out
    assert "1 min 15 s" in out
    assert not [sign for sign in out if ord(sign) < 32 and sign != "\n"]


def test_a_terminal_gets_a_bar_and_the_cursor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = console_output(terminal=True, steps=5, clock=[0.0], monkeypatch=monkeypatch, folder=tmp_path)
    assert "step 5/5" in out
    assert "loss 3" in out
    assert "1.23 k tokens/s" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # shown again after it was hidden
    assert "\x1b[31m" not in out


# ------------------------------------------------------------------------------------------------------------- text


def test_numbers_as_people_read_them() -> None:
    assert [short(value) for value in (None, 3.14159, 1000.0, 1e-9, float("nan"))] == ["–", "3.142", "1000", "1e-09", "nan"]
    assert [scaled(value) for value in (0.5, 12345, 999_600, 10_412_032, 3e18)] == [
        "0.5",
        "12.3 k",
        "1.00 M",
        "10.4 M",
        "3.00 E",
    ]
    assert [tick(value) for value in (0, 0.25, 40_000, 1500, 1e-05)] == ["0", "0.25", "40 k", "1.5 k", "1e-05"]
    assert [duration(value) for value in (None, 0.5, 59.7, 75, 3600, 93784)] == [
        "–", "0.50 s", "1 min", "1 min 15 s", "1 h", "1 d 2 h",
    ]  # fmt: skip
    assert percent(0.375) == "37.5 %"
    assert printable("a\tb\n\x1b[0m") == "a\tb\n�[0m"


# -------------------------------------------------------------------------------------------------------------- log


def test_a_rank_log_takes_what_a_library_sends_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import sys

    chatty = logging.getLogger("test_track.chatty")
    handler = logging.StreamHandler(sys.stdout)
    chatty.addHandler(handler)
    chatty.setLevel(logging.INFO)
    chatty.propagate = False
    with open_rank_log(tmp_path, 3) as log:
        chatty.info("before")
        late = logging.getLogger("test_track.late")
        late.addHandler(logging.StreamHandler(sys.stderr))
        late.propagate = False
        log.capture()
        late.error("after")
    assert capfd.readouterr() == ("", "")
    chatty.info("its own again")
    assert capfd.readouterr().out == "its own again\n"
    lines = (tmp_path / "logs" / "rank-00003.log").read_text().splitlines()
    assert [line.partition(" rank 3 ")[2] for line in lines] == [
        "INFO test_track.chatty: before",
        "ERROR test_track.late: after",
    ]
    chatty.removeHandler(handler)
    late.handlers.clear()
