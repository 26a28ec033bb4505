"""The wheel: it has every file that the code reads, and works where nothing of the checkout is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.end_to_end.runs import start

ROOT = Path(__file__).parents[2]
PACKED = ("pyproject.toml", "README.md", "LICENSE", "trainer", "parallel", "slurm")
# Files of a package that are for its readers only.
NOT_READ = {"README.md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, built by the environment's own setuptools: no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "copy").mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / "copy" / name)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    built = subprocess.run(command, cwd=folder / "copy", capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_it_has_what_the_code_reads_and_nothing_else(wheel: Path) -> None:
    """A data file that package-data does not name would be missed only where triaxis is installed."""
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in file.namelist()} - {""}
    wanted = {path for package in ("trainer", "parallel") for path in _files(ROOT / package)}
    assert packed == wanted
    assert {"METADATA", "licenses/LICENSE", "entry_points.txt"} <= about


def _files(folder: Path) -> set[str]:
    """The files below a folder, those behind its links to folders included, as a wheel names them."""
    found = set()
    for path in folder.iterdir():
        if path.is_dir():
            found |= _files(path) if path.name != "__pycache__" else set()
        elif path.name not in NOT_READ:
            found.add(path.relative_to(ROOT).as_posix())
    return found


def test_a_file_that_is_read_lies_in_a_package(wheel: Path) -> None:
    """Code reads beside itself: a path that climbs out of its package is not there once it is installed."""
    climbing = re.compile(r"__file__\)(?:\.resolve\(\))?\.parents\[(\d)\]")
    wrong = []
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "parallel").rglob("*.py")]:
        depth = len(path.relative_to(ROOT).parts) - 1  # parents[depth] is the folder of the packages
        for found in climbing.finditer(path.read_text(encoding="utf-8")):
            if int(found[1]) >= depth and path.relative_to(ROOT).as_posix() not in STARTERS:
                wrong.append(path.relative_to(ROOT).as_posix())
    assert wrong == []


# These name the folder of the packages itself, for the PYTHONPATH of processes that they start.
STARTERS = ("trainer/track/wandb.py", "trainer/verify/processes.py")


def test_its_metadata_is_true(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = file.read(name).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Version: {project['version']}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "License-File: LICENSE\n" in metadata
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{project['version']}]" in text


@pytest.mark.grid
def test_it_works_where_nothing_of_the_checkout_is(wheel: Path, tmp_path: Path) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    done = start(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    recipe = {
        "model": {"family": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}},
        "data": {"tokenizer": "bytes", "seq_len": 32, "eval_fraction": 0.01},
        "batch": {"global_sequences": 2, "micro_sequences": 2},
        "train": {"steps": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    where = "import trainer, parallel, sys; sys.stdout.write(trainer.__file__ + parallel.__file__)"
    assert _run(installed, folder, "-c", where).count(str(installed)) == 2
    assert _run(installed, folder, "-m", "trainer", "--version").startswith("triaxis ")
    assert "train.steps" in _run(installed, folder, "-m", "trainer", "check", "recipe.json")
    assert json.loads(_run(installed, folder, "-m", "trainer", "schema"))["title"] == "Recipe"
    words = ("submit", "recipe.json", "--nodes", "1", "--ranks-per-node", "1", "--dry-run")
    assert "#SBATCH" in _run(installed, folder, "-m", "trainer", *words)
    _run(installed, folder, "-m", "trainer", "train", "recipe.json")  # the corpus is Python's own library
    assert (folder / "runs" / "run" / "report.html").stat().st_size > 1000  # by the template in the wheel
    assert "# run" in (folder / "runs" / "run" / "export" / "README.md").read_text()


def _run(installed: Path, folder: Path, *words: str) -> str:
    done = start(sys.executable, *words, cwd=folder, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    return done.stdout
