"""The smallest examples of the guides, run as a reader would: from the pages' own text, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, Page

EXAMPLE = "Smallest example"


def guide(folder: str) -> Page:
    return Page.read(ROOT / folder / "README.md").section(EXAMPLE)


def walk(page: Page, folder: Path) -> str:
    """Write the files of a page into a folder and run its commands there, in the order of the page; what they printed."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    variables |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    said = []
    for block in page.blocks:
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, f"{page.path}: {block.text}{done.stdout}{done.stderr}"
            said.append(done.stdout)
    return "".join(said)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the guide of the data was followed, on whose run the others build."""
    folder = tmp_path_factory.mktemp("guides")
    walk(guide("trainer/data"), folder)
    return folder


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_guide_of_the_data(answers: Path) -> None:
    run = answers / "runs" / "answers"
    assert steps(run)[-1] >= 20
    assert (run / "export" / "model.safetensors").is_file()
    assert list((answers / "runs" / "data").rglob("header.json"))


def test_the_guide_of_inference(answers: Path) -> None:
    said = walk(guide("trainer/inference"), answers)
    measured = json.loads(said[said.rindex("\n{") :])
    assert (measured["task"], measured["data"]) == ("sft", ["chats.jsonl"])
    assert 0 <= measured["exact_match"] <= 1


def test_the_guide_of_tuning(answers: Path) -> None:
    said = walk(guide("trainer/tuning"), answers)
    assert (answers / "adapter" / "adapter_model.safetensors").is_file()
    assert (answers / "merged" / "model.safetensors").is_file()
    assert "tuning: " in said
    assert not (answers / "runs" / "tuned" / "export" / "model.safetensors").exists(), "the run's export is the adapter"


def test_the_guide_of_checkpoints(answers: Path) -> None:
    said = walk(guide("trainer/checkpoint"), answers)
    run = answers / "runs" / "answers"
    assert steps(run) == [5, 10, 15, 20, 25, 30]
    assert (run / "checkpoints" / "step-00000030").is_dir()
    assert (answers / "exported" / "model.safetensors").is_file()
    assert "resumed after step 20" in said


@pytest.mark.grid
def test_the_guide_of_layouts(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} times {n} is {n * n}. "}) + "\n" for n in range(500))
    )
    said = walk(guide("parallel"), tmp_path)
    assert steps(tmp_path / "runs" / "tp2") == steps(tmp_path / "runs" / "pp4") == list(range(1, 11))
    assert said.count("rounding") + said.count("same") >= 4


def test_the_test_that_the_guide_of_tests_shows(tmp_path: Path) -> None:
    (program,) = [block.text for block in guide("tests").blocks if block.language == "python"]
    (tmp_path / "test_shown.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shown.py"]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_page_whose_command_fails_is_found(tmp_path: Path) -> None:
    page = Page("README.md", "Write `r.json`:\n\n```json\n{}\n```\n\n```bash\ntest -s r.json\ntriaxis check r.json\n```\n")
    with pytest.raises(AssertionError, match="no model: give"):
        walk(page, tmp_path)
