"""`triaxis doctor` as a user starts it, on machines whose faults are faked around the process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import start, write_recipe
from trainer.planner.devices import measured_device

DOCTOR = (sys.executable, "-m", "trainer", "doctor")
ROOT = str(Path(__file__).parents[2])
# Python runs a module of this name at its start: what the system answers is replaced before anything asks.
TINY_SHM = """
import os, types
real = os.statvfs
tiny = types.SimpleNamespace(f_blocks=16384, f_bavail=16384, f_frsize=4096)
os.statvfs = lambda path: tiny if path == "/dev/shm" else real(path)
"""

# It answers questions about itself, and compiles nothing.
FAILS_TO_COMPILE = """#!/bin/sh
case "$*" in
    *" -c "*) echo "lion.cpp:7:1: fatal error: no such luck" >&2; echo more >&2; exit 1 ;;
    *) echo 12.2.0 ;;
esac
"""


def findings(stdout: str) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(stdout)["findings"]}


@pytest.fixture
def faults(tmp_path: Path) -> dict[str, str]:
    """The variables of a machine with many faults at once."""
    patched = tmp_path / "patched"
    for package, version in (("torch", "2.4.1"), ("transformers", "5.2.0")):
        folder = patched / f"{package}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (patched / "sitecustomize.py").write_text(TINY_SHM)
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_lion" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "libaio.h").write_text("int io_submit();\n")
    (tmp_path / "libaio.so").touch()
    (tmp_path / "bin").mkdir()
    return {
        "PATH": str(tmp_path / "bin"),  # no compiler, no ninja
        "PYTHONPATH": f"{patched}{os.pathsep}{ROOT}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CPATH": str(tmp_path),
        "LIBRARY_PATH": str(tmp_path),
        "CUDA_HOME": "/nowhere/cuda",
        "HOME": "/sys/kernel",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
        **{"SLURM_NTASKS_PER_NODE": "2"},
    }


def test_every_fault_is_found_at_once_and_has_a_command(tmp_path: Path, faults: dict[str, str]) -> None:
    done = start(*DOCTOR, "--json", cwd=tmp_path, **faults)
    assert done.returncode == 78, done.stderr
    found = findings(done.stdout)
    stopping = {name for name, finding in found.items() if finding["state"] == "broken" and finding["needed"]}
    assert stopping == {"torch version", "transformers version", "launcher"}
    assert "CVE-2025-32434 before 2.6.0" in found["torch version"]["seen"]
    fixes = {name: finding["fix"] for name, finding in found.items() if finding["state"] in ("broken", "fallback")}
    assert fixes["transformers version"] == 'pip install "transformers>=5.3"'
    assert "CVE-2026-4372" in found["transformers version"]["seen"]
    assert fixes["stale lock"] == f"rm {tmp_path}/extensions/py311_cpu/cpu_lion/lock"
    assert fixes["CUDA_HOME"] == "unset CUDA_HOME"
    assert fixes["locale"] == "export LC_ALL=C.UTF-8"
    assert "SLURM_PROCID=5 is outside SLURM_NTASKS=2" in found["launcher"]["seen"]
    assert "older than 0.3.111" in found["libaio"]["seen"]
    assert "no c++ on the PATH" in found["compiler"]["seen"]
    assert "64 MiB free of 64" in found["shared memory"]["seen"]
    assert "cannot be written" in found["home"]["seen"]
    assert found["cpu_lion"]["state"] == "broken"
    without = {name for name, fix in fixes.items() if not fix}
    assert without <= {"async_io", "cpu_adam", "fused_adam", "deepspeed_shm_comm"}, "nothing to do, or said of its cause"


def test_what_a_recipe_needs_decides(tmp_path: Path) -> None:
    """Without a compiler AdamW trains and lion cannot; the table says so in 80 columns, the fault first."""
    recipe = write_recipe(tmp_path, optimizer__name="lion", optimizer__lr=1e-4)
    (tmp_path / "bin").mkdir()
    faults = {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = start(*DOCTOR, str(recipe), cwd=tmp_path, **faults)
    lines = done.stdout.splitlines()
    assert done.returncode == 78, done.stderr
    assert lines[0].startswith("broken    ")
    assert max(len(line) for line in lines if "→" not in line) <= 80
    assert lines[-1] == "a run here would fail: compiler, ninja, cpu_lion"
    assert any("triaxis data prepare" in line for line in lines), "what `submit` remarks is said here too"


def test_a_build_that_fails_says_the_compiler_s_first_line(tmp_path: Path) -> None:
    """It breaks a lock that a killed build left, and the next look knows what went wrong."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(FAILS_TO_COMPILE)
    compiler.chmod(0o755)
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_lion" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    path = f"{compiler.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    faults = {"PATH": path, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": str(compiler), "HOME": str(tmp_path)}
    done = start(*DOCTOR, "--build", "--json", cwd=tmp_path, **faults)
    assert done.returncode == 0, done.stderr
    assert f"removed {lock}" in done.stderr
    assert not lock.exists()
    assert "cpu_lion: failed: lion.cpp:7:1: fatal error: no such luck" in done.stderr
    lion = findings(done.stdout)["cpu_lion"]
    assert (lion["state"], lion["needed"]) == ("broken", False)
    assert "could not be compiled: lion.cpp:7:1: fatal error: no such luck" in lion["seen"]
    assert findings(done.stdout)["async_io"]["state"] == "fallback"


@pytest.mark.grid
def test_the_sheet_has_what_a_planner_reads(tmp_path: Path) -> None:
    done = start(*DOCTOR, "--measure", "--json", cwd=tmp_path, XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "triaxis" / "here.json").read_text())
    here = written["here"]
    assert json.loads(done.stdout)["here"] == here
    assert {"fp32", "bf16"} <= set(here["peaks"])
    positive = ("memory", "bandwidth", "launch", "call", "per_node")
    assert all(here[name] > 0 for name in positive)
    assert all(here[link][figure] > 0 for link in ("inside", "outside") for figure in ("rate", "latency", "share"))
    measured = written["measured"]
    assert {one["kind"] for one in measured["pair"]["collectives"]} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "send_and_back",
    }
    assert measured["disk"]["write_bytes_per_s"] > 0
    assert min(product["flops_per_s"] for product in measured["alone"]["products"]) > 0
    on_cores = measured_device(written).speeds
    assert [speed.ranks for speed in on_cores] == ([] if here["asynchronous"] else [1, 2])


@pytest.mark.grid
def test_a_build_is_used_afterwards(tmp_path: Path) -> None:
    """Lion trains from what --build compiled, without any compiler in sight."""
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "MAX_JOBS": "2"}
    built = start(*DOCTOR, "--build", "--json", cwd=tmp_path, **extensions)
    lion = findings(built.stdout)["cpu_lion"]
    if lion["state"] != "ready":
        pytest.skip(f"no compiler here: {lion['seen']}")
    recipe = write_recipe(tmp_path, optimizer__name="lion", optimizer__lr=1e-4, train__steps=2)
    done = start(sys.executable, "-m", "trainer", "train", str(recipe), cwd=tmp_path, **extensions, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
