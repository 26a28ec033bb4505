"""Where stdout or stderr cannot be written: the exit code that there would be, and a line where there is a place for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = {
    "model": {"family": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}},
    "data": {"sources": [{"path": "text.txt"}], "seq_len": 16, "eval_fraction": 0.0},
    "batch": {"global_sequences": 2},
    "train": {"steps": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    (tmp_path / "text.txt").write_text("to be or not to be " * 40)
    return tmp_path


def triaxis(words: str, folder: Path, redirected: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell that redirects its outputs."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -m trainer {words} {redirected}', sys.executable],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "redirected", "code", "says"),
    [
        ("check recipe.json", ">/dev/full", 65, "stdout: No space left on device: output is lost"),
        ("schema", ">&-", 65, "stdout: Bad file descriptor"),
        ("check recipe.json", "2>/dev/full", 0, ""),
        ("check nothing.json", "2>/dev/full", 78, ""),
        ("check nothing.json", ">/dev/full", 78, "nothing.json: no such file"),
        ("check nothing.json", ">/dev/full 2>/dev/full", 78, ""),
        ("check nothing.json", "2>&-", 78, ""),
        ("--help", ">/dev/full", 65, "stdout: No space left"),
    ],
)
def test_the_exit_code_stays_and_the_line_goes_where_it_can(
    words: str, redirected: str, code: int, says: str, folder: Path
) -> None:
    done = triaxis(words, folder, redirected)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == (1 if says else 0)


def test_whoever_reads_a_pipe_may_leave(folder: Path) -> None:
    done = triaxis("schema", folder, "| head -1")
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_a_terminal_of_another_alphabet_shows_what_it_has(folder: Path) -> None:
    done = triaxis("check recipe.json --world-size 2", folder, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "micro 1 \\xd7 data-parallel 2" in done.stdout
    assert json.loads(triaxis("schema", folder, PYTHONIOENCODING="ascii").stdout)["properties"]


def test_a_run_whose_output_nobody_can_show_reaches_its_end(folder: Path) -> None:
    done = triaxis("train recipe.json", folder, ">/dev/full")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "triaxis: error: stdout: No space left on device: output is lost\n"
    assert len((folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("words", ["check $(printf '\\377')", "check recipe.json --set run.dir=$(printf '\\377')"])
def test_bytes_that_are_no_text_are_one_line(words: str, folder: Path) -> None:
    done = triaxis(words, folder)
    assert done.returncode == 78
    assert "is not UTF-8" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_gone_is_one_line(folder: Path) -> None:
    (folder / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir ../gone; "$0" -m trainer check recipe.json', sys.executable],
        cwd=folder / "gone",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (78, "triaxis: error: the current folder is gone: cd to one that is there\n")
