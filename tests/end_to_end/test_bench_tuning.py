"""The benchmark of fine-tuning runs, and what it compares is the same. No time is asserted: machines differ, and this one is
busy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tuning import PEERS, main
from tuning.rows import rows_of
from tuning.turns import Loop, LoopFailed, Step

from parallel.documents import Documents
from trainer.data.loader import MicroBatch

ROOT = Path(__file__).parents[2]
IGNORE = -100


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """A benchmark of tiny models, and its figures."""
    path = folder / "figures.jsonl"
    done = subprocess.run(
        [sys.executable, "tools/bench_tuning.py", "--quick", "--json", str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return done, [json.loads(line) for line in lines]


def assert_measured(figure: dict[str, Any]) -> None:
    ratio = figure["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert math.isfinite(ratio["high"])
    assert 0 < figure["targets_per_s"] < figure["tokens_per_s"]
    assert 0.1 < figure["peak_gib"] < 8
    assert 0.1 < figure["peer_peak_gib"] < 8


def test_packed_answers_beside_trl(tmp_path: Path) -> None:
    done, figures = run(tmp_path, "--dtypes", "fp32", "--works", "sft", "--peers", "trl, rows flattened", "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(figure["work"], figure["dtype"], figure["peer"]) for figure in figures] == [("sft", "fp32", "trl, rows flattened")]
    assert_measured(figures[0])
    assert not list(tmp_path.glob("bench-tuning-*")), "models and runs are removed"


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("work", PEERS)
def test_every_work_beside_its_trainers(work: str, dtype: str, tmp_path: Path) -> None:
    done, figures = run(tmp_path, "--dtypes", dtype, "--works", work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [figure["peer"] for figure in figures] == list(PEERS[work])
    for figure in figures:
        assert_measured(figure)


def test_a_peer_that_is_unknown_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--peers", "trl"])
    assert "--peers 'trl': legal are 'trl, rows flattened'" in capsys.readouterr().err


COUNTING = """
import sys
from tuning.turns import Turn

turn = Turn.from_arguments()
step = 0
while turn.wait(loss=step, grad_norm=2 * step):
    step += 1
    if step == int(open(sys.argv[1]).read()):
        sys.exit("this many steps are too many")
"""


def test_a_loop_takes_its_turns_and_says_why_it_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting.py").write_text(COUNTING, encoding="utf-8")
    (tmp_path / "job").write_text("3", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    loop = Loop("a", "counting", tmp_path / "job", tmp_path / "log")
    steps = [loop.step() for _ in range(2)]
    assert steps == [Step(steps[0].seconds, 1, 2), Step(steps[1].seconds, 2, 4)]
    with pytest.raises(LoopFailed, match=r"^a has ended:\nthis many steps are too many$"):
        loop.step()
    loop.close()
    other = Loop("b", "counting", tmp_path / "job", tmp_path / "log")
    assert other.step().loss == 1
    assert 0 < other.end() < 1


def test_peers_get_documents_without_filler_and_labels_where_the_tokens_are() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 0, 0], [6, 7, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[IGNORE, 3, IGNORE, 5, IGNORE, IGNORE, IGNORE], [7, *[IGNORE] * 6]])
    batch = MicroBatch(tokens, Documents(((3, 2, 2), (2, 5))), labels)
    assert list(rows_of(batch)) == [
        [([1, 2, 3], [IGNORE, IGNORE, 3]), ([4, 5], [IGNORE, 5])],
        [([6, 7], [IGNORE, 7])],
    ]


def test_sources_of_translations_stay_though_they_have_no_target() -> None:
    tokens = torch.tensor([[1, 2, 3, 0, 4, 5, 6, 7]])
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, IGNORE, 5, IGNORE, 7, IGNORE]])
    batch = MicroBatch(tokens, Documents(((2, 1, 1, 2, 2),)), labels)
    sources_and_targets = [([1, 2], [IGNORE] * 2), ([3], [IGNORE]), ([4, 5], [IGNORE, 5]), ([6, 7], [IGNORE, 7])]
    assert list(rows_of(batch)) == [sources_and_targets]
