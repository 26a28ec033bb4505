"""A pipeline stage that dies or stops ends the other ranks in time, with one line that names it and a page that shows what each
rank was doing; nobody is left behind. Other ways to hang: test_campaign_faults.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
TIMEOUT_S = 8
KILLED, STOPPED = (signal.SIGKILL, 75, "is gone"), (signal.SIGSTOP, 124, "is stopped (SIGSTOP")
LOSSES = [
    (*KILLED, 1),
    pytest.param(*KILLED, 0, marks=pytest.mark.grid),
    *(pytest.param(*STOPPED, rank, marks=pytest.mark.grid) for rank in (0, 1)),
]
RECIPE = {
    "run": {"name": "run"},
    "model": {
        "family": "llama",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
    },
    "data": {"seq_len": 32, "eval_fraction": 0.0},
    "parallel": {"pipeline": 2},
    "batch": {"global_sequences": 4},
    "train": {"steps": 1_000_000},
    "guard": {"timeout_s": TIMEOUT_S},
}


@pytest.fixture
def ranks(port: int, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks that are training."""
    (tmp_path / "corpus.txt").write_text("to be or not to be " * 500)
    recipe = {**RECIPE, "data": {**RECIPE["data"], "sources": [{"path": str(tmp_path / "corpus.txt")}]}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", "recipe.json"],
            cwd=tmp_path,
            env={
                **os.environ,
                **place,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline, "no step in 90 s"
            ended = [rank for rank in started if rank.poll() is not None]
            assert not ended, [last_words(rank, 10) for rank in ended]
            time.sleep(0.1)
        yield started
    finally:
        for rank in started:
            rank.kill()
            rank.communicate()


def last_words(rank: subprocess.Popen[str], within_s: float) -> str:
    """What it wrote to stderr, when it ended by itself in time."""
    _, said = rank.communicate(timeout=within_s)
    return said


@pytest.mark.parametrize(("signal_number", "exit_code", "what", "lost"), LOSSES)
def test_the_others_end_and_name_it(
    signal_number: signal.Signals, exit_code: int, what: str, lost: int, ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    survivor = ranks[1 - lost]
    os.kill(ranks[lost].pid, signal_number)
    said = last_words(survivor, TIMEOUT_S + 20)  # 5 s are promised; a busy machine may be slow to end a process
    assert survivor.returncode == exit_code, said
    (line,) = [line for line in said.splitlines() if line.startswith("triaxis: error:")]
    assert f"rank {1 - lost}: rank {lost} {what}" in line
    assert " of step " in line
    (page,) = (tmp_path / "runs" / "run" / "logs").glob("autopsy-*.txt")
    assert f"what each rank did: {Path('runs') / page.relative_to(tmp_path / 'runs')}" in line
    shown = page.read_text()
    assert shown in said, "the page is on stderr too"
    assert any(row.startswith(f"{lost}  ") and what in row for row in shown.splitlines())
    assert f"stack of rank {1 - lost}, the innermost first" in shown
    assert "frame #" not in said, "torch's own C++ frames"
    assert ranks[lost].wait(10) == -signal.SIGKILL, "who is stopped cannot end itself: the survivor does it"
