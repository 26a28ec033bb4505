"""The doctor's checks, on machines with faults that are faked: in folders, in variables, in what the system answers."""

from __future__ import annotations

import _ctypes
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.cli import main
from trainer.commands.doctor import COLUMNS, lines_of
from trainer.doctor import findings, limits, packages
from trainer.doctor.accelerators import check_accelerators, check_backends, check_torch
from trainer.doctor.case import Case
from trainer.doctor.checks import examine
from trainer.doctor.compiler_lines import first_error
from trainer.doctor.findings import Finding, State, broken, fallback, ready
from trainer.doctor.folders import check_clock, check_folders
from trainer.doctor.launchers import check_launcher, check_network
from trainer.doctor.looking import start_looking
from trainer.doctor.ops import check_deepspeed, check_locks
from trainer.doctor.recipe_needs import check_hub, check_wandb
from trainer.doctor.sheet import link_of
from trainer.doctor.toolchain import check_compiler, check_cuda_home, check_libaio, check_ninja
from trainer.engine import built_ops, threaded_io
from trainer.files import mounts
from trainer.recipe import load

TORCH = {"version": "2.13.0", "folder": "/", "cuda": "12.8", "hip": None, "seconds": 2.0}
BACKENDS = {"gloo": True, "nccl": True, "mpi": False}


def case(environment: Mapping[str, str] | None = None, recipe: Path | None = None, **seen: Any) -> Case:
    """A case of which torch and DeepSpeed saw this."""
    here = {"PATH": os.environ["PATH"], **(environment or {})}
    return Case(here, lambda: {"torch": {**TORCH, "backends": BACKENDS}, **seen}, load(recipe, ()) if recipe else None)


def write(folder: Path, **sections: Any) -> Path:
    """A recipe that stands by itself."""
    path = folder / "recipe.json"
    recipe = {"run": {"dir": str(folder / "runs")}, "model": {"family": "gpt2", "config": {"n_embd": 64, "n_head": 4}}}
    path.write_text(json.dumps(recipe | {"data": {"sources": [{"path": "stdlib"}], "tokenizer": "bytes"}} | sections))
    return path


def only(found: Iterator[Finding]) -> Finding:
    (one,) = found
    return one


# ----------------------------------------------------------------------------------------------------------- what is shown


def test_findings_are_sorted_shown_narrow_and_their_commands_whole() -> None:
    """What stops a run comes first; a command is never broken over lines, so that it can be copied."""
    fix = "pip install " + "x" * 90
    checks = (
        lambda _: [ready("a", "1"), broken("b", "2", "", needed=False)],
        lambda _: [fallback("c", "3"), broken("d", "4", fix)],
    )
    found = examine(case(), checks)  # type: ignore[arg-type]
    assert [finding.name for finding in found] == ["d", "b", "c", "a"]
    assert [finding.stops for finding in found] == [True, False, False, False]
    lines = lines_of(broken("a long name of a thing", "words " * 40, fix))
    assert lines[-1] == f"          → {fix}"
    assert len(lines) > 4
    assert max(map(len, lines[:-1])) <= COLUMNS
    assert " ".join(" ".join(lines[:-1]).split()) == "broken a long name of a thing " + " ".join(["words"] * 40)


def test_a_machine_that_breaks_a_check_is_a_finding() -> None:
    def check_everything(_: Case) -> Iterator[Finding]:
        raise OSError(5, "Input/output error")
        yield

    found = only(iter(examine(case(), [check_everything])))
    assert (found.name, found.state, found.stops) == ("everything", State.BROKEN, False)
    assert "Input/output error" in found.seen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctor", "--sheet", "x.json"], "--sheet FILE is where --measure writes"),
        (["doctor", "--set", "run.seed=1"], "--set overrides a value of RECIPE, which is not given"),
        (["doctor", "nothing.json"], "nothing.json"),
        (["doctor", "--biuld"], "did you mean --build?"),
    ],
)
def test_words_that_mean_nothing_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 78
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- packages


def test_the_doctor_s_floors_are_those_of_the_project() -> None:
    wanted = packages._wanted()
    lines = [line for line in metadata.requires("triaxis") or [] if "extra" not in line]
    assert len(wanted) == len(lines) > 15
    assert all(wanted.values())
    assert [finding.state for finding in packages.check_packages(case())] == [State.READY]


@pytest.mark.parametrize(("version", "numbers"), [("2.13.0+cu128", (2, 13)), ("4.0", (4,)), ("5.3.1rc1", (5, 3, 1)), ("x", ())])
def test_versions_are_compared_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert packages.parts(version) == numbers


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0"}
    monkeypatch.setattr(packages, "_installed", versions.get)
    monkeypatch.setattr(packages, "_wanted", lambda: {"torch": "2.13", "pydantic": "2.11"})
    assert [(one.state, one.fix) for one in packages.check_packages(case())] == [
        (State.BROKEN, 'pip install "pydantic>=2.11"'),
        (State.READY, ""),
    ]


# -------------------------------------------------------------------------------------------------- folders and their disks


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """/sys takes no file of anybody, root included."""
    path = write(tmp_path, run={"dir": "/sys/kernel/runs"})
    found = {one.name: one for one in check_folders(case({"HOME": "/sys/kernel", "TMPDIR": str(tmp_path)}, path))}
    assert found["run folder"].stops
    assert "/sys/kernel/runs/run cannot be written: /sys/kernel: " in found["run folder"].seen
    assert found["home"].state is State.FALLBACK
    assert found["home"].fix.startswith("export XDG_CACHE_HOME=")
    assert found["temporary files"].state in (State.READY, State.FALLBACK)  # a busy disk is slow
    assert [name for name in os.listdir(tmp_path) if name.startswith(".triaxis")] == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.statvfs

    def full(path: Any) -> Any:
        real = whole(path)
        return SimpleNamespace(f_bavail=100, f_frsize=4096, f_blocks=real.f_blocks, f_files=0, f_favail=0)

    monkeypatch.setattr(os, "statvfs", full)
    found = {one.name: one for one in check_folders(case({"HOME": str(tmp_path)}, write(tmp_path)))}
    assert found["run folder"].stops
    assert "0 MB are free, less than 1 GiB" in found["run folder"].seen


def test_the_clock_of_a_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(check_clock(case({}, write(tmp_path)))).state is State.READY
    monkeypatch.setattr("trainer.doctor.folders.time.time", lambda: os.stat(tmp_path).st_mtime + 3600)
    found = only(check_clock(case({}, write(tmp_path))))
    assert (found.state, found.fix) == (State.FALLBACK, "sudo chronyc makestep")
    assert "before that of" in found.seen


def test_the_file_system_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /home rw,relatime shared:1 - nfs4 server:/home rw\n"
        "3 2 0:6 / /home/a\\040b rw - fuse.sshfs x rw\n"
        "4 1 0:7 / /homework rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(mounts, "TABLE", table)
    assert mounts.mount_of(Path("/home/me/runs")) == ("/home", "nfs4")
    assert mounts.mount_of(Path("/home/a b/c")) == ("/home/a b", "fuse.sshfs")
    assert mounts.mount_of(Path("/homework/x")).kind == "tmpfs"
    assert mounts.mount_of(Path("/x")) == ("/", "ext4")
    assert [mounts.mount_of(Path(path)).is_shared for path in ("/home/me", "/home/a b", "/x")] == [True, True, False]


def test_a_folder_for_builds_on_a_disk_of_many_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.doctor.folders.mount_of", lambda _: mounts.Mount("/home", "nfs4"))
    found = {one.name: one for one in check_folders(case({"HOME": str(tmp_path)}, write(tmp_path)))}
    assert "nfs4" in found["extensions"].seen
    assert found["extensions"].fix == 'export TORCH_EXTENSIONS_DIR="/tmp/extensions-$(id -u)"'
    assert "shared by machines" not in found["run folder"].seen, "runs belong there"


# ---------------------------------------------------------------------------------------------- locks of builds, and builds


def a_lock(folder: Path, name: str) -> Path:
    lock = folder / "py311_cpu" / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_that_nobody_holds_is_stale_and_one_that_is_held_is_a_build(tmp_path: Path) -> None:
    left, held = a_lock(tmp_path, "async_io"), a_lock(tmp_path, "cpu_lion")
    with held.open():
        found = {one.name: one for one in check_locks(case({"TORCH_EXTENSIONS_DIR": str(tmp_path)}))}
    assert found["stale lock"].fix == f"rm {left}"
    assert not found["stale lock"].stops, "no recipe needs it"
    assert f"process {os.getpid()} compiles cpu_lion" in found["build"].seen


def test_on_a_shared_disk_a_lock_may_be_another_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = a_lock(tmp_path, "cpu_lion")
    monkeypatch.setattr("trainer.engine.extension_folder.mount_of", lambda _: mounts.Mount("/", "nfs"))
    assert [*check_locks(case({"TORCH_EXTENSIONS_DIR": str(tmp_path)}))] == []
    os.utime(lock, (0, 0))
    lion = write(tmp_path, optimizer={"name": "lion"})
    assert only(check_locks(case({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, lion))).stops


EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "cpu_lion", "", -1, NULL};
PyMODINIT_FUNC PyInit_cpu_lion(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "answer", 42);
    return made;
}
"""


def test_what_was_built_ahead_is_what_deepspeed_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own `load` returns it, without its lock, its compiler, or a look at its sources."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    from deepspeed.ops.op_builder import CPULionBuilder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(built_ops.OpBuilder, "_loaded_ops", {})
    assert not built_ops.use_built("cpu_lion")
    library = built_ops.built_file("cpu_lion")
    library.parent.mkdir(parents=True)
    include = sysconfig.get_path("include")
    words = ["cc", "-shared", "-fPIC", f"-I{include}", "-x", "c", "-", "-o", str(library)]
    subprocess.run(words, input=EXTENSION, text=True, check=True)
    assert built_ops.use_built("cpu_lion")
    assert CPULionBuilder().load().answer == 42
    assert built_ops.root().parent == tmp_path
    monkeypatch.setattr(built_ops, "version", "0.0.1")
    assert not built_ops.built_file("cpu_lion").exists(), "another version has another folder"


def test_an_extension_of_another_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(built_ops.OpBuilder, "_loaded_ops", {})
    library = built_ops.built_file("cpu_lion")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not for this machine")
    with pytest.raises(OSError, match=r"cpu_lion\.so"):
        built_ops.use_built("cpu_lion")
    library.rename(library.parent.parent / "async_io.so")
    monkeypatch.setattr(built_ops, "LOADED_FIRST", {})
    monkeypatch.setattr(built_ops, "built_file", lambda name: library.parent.parent / f"{name}.so")
    monkeypatch.setattr(threaded_io.AsyncIOBuilder, "load", threaded_io.AsyncIOBuilder.load)  # put back at the end
    assert "cannot be loaded here" in str(threaded_io.use_threads_where_async_io_is_missing())


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "[1/3] c++ -Werror=x -c a.cpp\nFAILED: [code=1] a.o\n\x1b[1ma.cpp:3:10:\x1b[m fatal error: libaio.h: No such "
            "file or directory\nninja: build stopped: subcommand failed.\nRuntimeError: Error building extension 'async_io'",
            "a.cpp:3:10: fatal error: libaio.h: No such file or directory",
        ),
        (
            "[2/2] c++ x.o -laio\n/usr/bin/ld: cannot find -laio: No such file\ncollect2: error: ld returned 1",
            "/usr/bin/ld: cannot find -laio: No such file",
        ),
        ("/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed.", "/bin/sh: 1: c++: not found"),
        ("something else\nthe end", "the end"),
        ("", "no output"),
    ],
)
def test_the_first_line_that_says_what_is_wrong(output: str, line: str) -> None:
    assert first_error(output) == line


def ops(**states: Any) -> dict[str, Any]:
    """What the process sees of DeepSpeed on a CPU."""
    nothing = {"installed": False, "built": False, "error": ""}
    names = ("async_io", "cpu_lion", "cpu_adam", "cpu_adagrad")
    return {
        "version": "0.19.8",
        "accelerator": "cpu",
        "root": "/nowhere",
        "ops": {name: states.get(name, nothing) for name in names},
    }


def test_each_extension_is_ready_or_has_a_fallback_or_is_broken(tmp_path: Path) -> None:
    lion = write(tmp_path, optimizer={"name": "lion"})
    seen = ops(async_io={"installed": True, "built": False, "error": "PyTorch version mismatch!\nInstall torch version=2.4"})
    found = {one.name: one for one in check_deepspeed(case({"PATH": str(tmp_path)}, lion, deepspeed=seen))}
    assert found["async_io"].state is State.FALLBACK
    assert "is built, and cannot be loaded" in found["async_io"].seen
    assert "threads read and write" in found["async_io"].seen
    assert found["async_io"].fix == "pip install --no-build-isolation --force-reinstall --no-deps deepspeed"
    assert found["cpu_adam"].state is State.FALLBACK
    assert found["cpu_lion"].stops
    assert "no c++ on the PATH" in found["cpu_lion"].seen
    assert found["cpu_lion"].fix == only(check_compiler(case({"PATH": str(tmp_path)}))).fix
    built = {"installed": False, "built": True, "error": ""}
    found = {one.name: one for one in check_deepspeed(case({"PATH": str(tmp_path)}, lion, deepspeed=ops(cpu_lion=built)))}
    assert found["cpu_lion"].state is State.READY


def test_a_deepspeed_that_cannot_be_imported_stops_a_run() -> None:
    found = only(check_deepspeed(case({}, deepspeed={"error": "ModuleNotFoundError: No module named 'deepspeed'"})))
    assert found.stops


def test_a_process_that_dies_or_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch may end the process (an illegal instruction) or never end."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    root = str(Path(__file__).parents[2])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    facts = start_looking(environment)()
    assert facts["torch"]["error"].startswith("ended the process by SIGILL")
    found = [*check_torch(Case(environment, lambda: facts)), *check_deepspeed(Case(environment, lambda: facts))]
    assert [one.stops for one in found] == [True]
    hangs = f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    (tmp_path / "torch.py").write_text(hangs)
    monkeypatch.setattr("trainer.doctor.looking.PATIENCE_S", 1.0)
    look, pid = start_looking(environment), tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):  # however long a busy machine takes to come to the import
        time.sleep(0.01)
    assert look()["torch"]["error"] == "did not end in 1 s"
    assert not Path("/proc", pid.read_text()).exists(), "who hangs is ended"


# ------------------------------------------------------------------------------------------------------------ toolchain


def test_a_compiler_that_is_too_old_says_its_own_line(tmp_path: Path) -> None:
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho \"c++: error: unrecognized command line option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    found = only(check_compiler(case({"CXX": str(old)})))
    assert found.state is State.FALLBACK
    assert "unrecognized command line option '-std=c++20'" in found.seen
    assert only(check_compiler(case({"CXX": "/nowhere/c++"}))).fix == "unset CXX"


def test_ninja_beside_python_but_not_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ninja").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert only(check_ninja(case({"PATH": "/nowhere"}))).fix == f'export PATH="{tmp_path}:$PATH"'
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert only(check_ninja(case({"PATH": "/nowhere"}))).fix == "pip install ninja"


def test_a_cuda_home_that_leads_nowhere_and_one_of_another_version(tmp_path: Path) -> None:
    found = only(check_cuda_home(case({"CUDA_HOME": "/nowhere"})))
    assert (found.state, found.stops, found.fix) == (State.BROKEN, False, "unset CUDA_HOME")
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    compiler.chmod(0o755)
    found = only(check_cuda_home(case({"CUDA_HOME": str(tmp_path)})))
    assert found.state is State.FALLBACK
    assert "is 11.8, and torch is built with 12.8" in found.seen


def libaio(folder: Path, header: str, library: Path | None) -> dict[str, str]:
    """Variables that lead compilers to this libaio."""
    (folder / "libaio.h").write_text(header)
    if library:
        shutil.copy(library, folder / "libaio.so")
    return {"CFLAGS": f"-O2 -I{folder}", "LIBRARY_PATH": str(folder)}


def test_libaio_missing_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.doctor.toolchain.INCLUDED", ())
    monkeypatch.setattr("trainer.doctor.toolchain._linked", tuple)
    monkeypatch.setattr(findings.shutil, "which", lambda name: f"/usr/bin/{name}" if name in ("sudo", "dnf") else None)
    missing = only(check_libaio(case()))
    assert "libaio.h and libaio.so not found" in missing.seen
    assert missing.fix.endswith("dnf install -y libaio-devel")
    any_library = Path(str(_ctypes.__file__))  # which is no libaio
    for header in ("int io_submit();", "int io_submit(); int io_pgetevents();"):
        old = only(check_libaio(case(libaio(tmp_path, header, any_library))))
        assert old.state is State.FALLBACK
        assert "older than 0.3.111: it lacks io_pgetevents" in old.seen
    if os.path.exists("/usr/bin/cc"):
        new = tmp_path / "new"
        new.mkdir()
        words = ["/usr/bin/cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(new / "libaio.so")]
        subprocess.run(words, input="int io_pgetevents(void) { return 0; }", text=True, check=True)
        assert only(check_libaio(case(libaio(new, "int io_pgetevents();", None)))).state is State.READY


def test_without_rights_the_command_is_conda_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(findings.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    names = {"debian": "g++", "fedora": "gcc-c++", "conda": "cxx-compiler"}
    assert findings.install(**names) == "conda install -y -c conda-forge cxx-compiler"
    monkeypatch.setattr(findings.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert findings.install(**names) == "sudo apt-get install -y g++"


# ------------------------------------------------------------------------------------------------- accelerators and groups

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory": 80 << 30, "free": 79 << 30}


def gpus(*devices: dict[str, Any], built_for: tuple[str, ...] = ("sm_80", "sm_90")) -> dict[str, Any]:
    return {"devices": {"devices": list(devices), "built_for": list(built_for)}}


def test_the_gpus_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    assert only(check_accelerators(case({}, **gpus(H100, H100)))).seen == "2 × NVIDIA H100 80GB HBM3, 80 GiB, 9.0"
    taken = {**H100, "free": 30 << 30}
    slice_of_one = {**H100, "name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb"}
    new = {**H100, "capability": "12.0", "error": "CUDA error: no kernel image is available for execution on the device"}
    found = [*check_accelerators(case({}, **gpus(taken, slice_of_one, new)))][1:]
    assert [(one.name, one.state) for one in found] == [
        ("GPU 0", State.FALLBACK),
        ("GPU 1", State.FALLBACK),
        ("GPU 2", State.BROKEN),
    ]
    assert "50 of its 80 GiB are taken" in found[0].seen
    assert "not sm_120" in found[2].seen
    v100 = {**H100, "name": "Tesla V100", "capability": "7.0"}
    bf16 = write(tmp_path, precision={"dtype": "bf16"})
    assert [one.name for one in check_accelerators(case({}, bf16, **gpus(v100)))] == ["accelerators", "bf16"]


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA L40S, 550.54'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_torch = {**TORCH, "cuda": None, "backends": {**BACKENDS, "nccl": False}}
    found = only(check_accelerators(case({}, torch=cpu_torch, **gpus())))
    assert found.stops
    assert "1 × NVIDIA L40S, 550.54, but this torch is built for CPUs alone" in found.seen
    assert only(check_accelerators(case({"CUDA_VISIBLE_DEVICES": "7"}, **gpus()))).fix == "unset CUDA_VISIBLE_DEVICES"
    assert only(check_accelerators(case({"CUDA_VISIBLE_DEVICES": ""}, **gpus()))).state is State.ABSENT
    assert only(check_accelerators(case({}, devices={"error": "RuntimeError: driver too old"}))).stops


def test_ranks_on_gpus_need_nccl_and_others_gloo() -> None:
    without = {**TORCH, "backends": {"gloo": True, "nccl": False, "mpi": False}}
    found = {
        one.name: one
        for one in check_backends(case({}, torch=without, gloo={"error": "RuntimeError: Unable to find address"}, **gpus(H100)))
    }
    assert found["NCCL"].stops
    assert not found["gloo"].stops
    found = {
        one.name: one for one in check_backends(case({}, torch=without, gloo={"error": "RuntimeError: Unable to find address"}))
    }
    assert found["gloo"].stops
    assert found["gloo"].fix.startswith("export GLOO_SOCKET_IFNAME=")
    assert found["NCCL"].state is State.ABSENT


def test_small_shared_memory_stops_only_nodes_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(f_blocks=16384, f_bavail=16384, f_frsize=4096)  # the 64 MiB that Docker gives
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    assert only(limits.check_shared_memory(case({}, **gpus(H100)))).state is State.FALLBACK
    assert only(limits.check_shared_memory(case({}, **gpus(H100, H100)))).stops


def test_limits_that_are_low(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = resource.getrlimit
    low = {resource.RLIMIT_NOFILE: (256, 65536), resource.RLIMIT_MEMLOCK: (65536, 65536), resource.RLIMIT_CORE: (-1, -1)}
    monkeypatch.setattr(limits.resource, "getrlimit", lambda number: low.get(number, (-1, -1)))
    found = {one.name: one for one in limits.check_limits(case())}
    assert found["open files"].fix == "ulimit -S -n 4096"
    assert found["core dumps"].fix == "ulimit -c 0"
    assert "locked memory" not in found or limits._has_infiniband()
    path = write(tmp_path, zero={"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}})
    found = {one.name: one for one in limits.check_limits(case({}, path))}
    assert "memlock unlimited" in found["locked memory"].fix
    assert real(resource.RLIMIT_NOFILE)


# ------------------------------------------------------------------------------------------------------- launchers, recipes


def test_an_interface_that_is_not_here_and_more_threads_than_cores() -> None:
    found = {one.name: one for one in check_network(case({"NCCL_SOCKET_IFNAME": "ib7", "OMP_NUM_THREADS": "100000"}))}
    assert found["network"].state in (State.READY, State.ABSENT)
    assert not any(one.stops for one in check_network(case({"NCCL_SOCKET_IFNAME": "ib7"}))), "no GPU wants NCCL"
    assert any(one.stops for one in check_network(case({"NCCL_SOCKET_IFNAME": "ib7"}, **gpus(H100))))
    states = [one.fix for one in check_network(case({"NCCL_SOCKET_IFNAME": "ib7", "GLOO_SOCKET_IFNAME": "lo"}))]
    assert "unset NCCL_SOCKET_IFNAME" in states
    assert "unset GLOO_SOCKET_IFNAME" not in states
    assert [one for one in check_network(case({"NCCL_SOCKET_IFNAME": "^docker0"})) if one.state is State.BROKEN] == []
    assert found["threads"].fix == "unset OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("environment", "wrong", "fix"),
    [
        ({"RANK": "0", "MASTER_PORT": "1"}, "RANK is set but LOCAL_RANK is not", "unset RANK MASTER_PORT"),
        ({"DS_ACCELERATOR": "cuda", "RANK": "0"}, "DS_ACCELERATOR=cuda, but torch", "unset DS_ACCELERATOR"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "WORLD_SIZE": "4"},
            "WORLD_SIZE=4 contradicts SLURM_NTASKS=2",
            "unset WORLD_SIZE",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "4"}, "SLURM_PROCID=4 is outside", "srun python -m trainer train RECIPE"),
    ],
)
def test_the_command_against_variables(environment: dict[str, str], wrong: str, fix: str) -> None:
    found = only(check_launcher(case(environment, place={"wrong": wrong})))
    assert found.stops
    assert found.fix == fix


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        port = other.getsockname()[1]
        place = {"how": "RANK=0", "rank": 0, "world_size": 2, "port": port}
        found = [*check_launcher(case({"MASTER_PORT": str(port)}, place=place))][-1]
    assert found.stops
    assert found.fix.startswith("export MASTER_PORT=")


def test_a_container_with_less_than_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("CPU_QUOTA", "CGROUP_LIMITS"):
        monkeypatch.setattr(limits, name, tmp_path / "cpu.max" if name == "CPU_QUOTA" else (tmp_path / "memory.max",))
    assert [one.name for one in limits.check_host(case())] == ["host"]
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(str(3 << 30))
    host, cores = limits.check_host(case())
    assert host.state is State.ABSENT
    assert "3.0 GiB" in host.seen
    assert cores.fix == "export OMP_NUM_THREADS=1"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert len([*limits.check_host(case())]) == 1


def test_variables_left_over_from_a_job_and_the_shell_of_one() -> None:
    place = {"how": "no launcher: one process", "rank": 0, "world_size": 1, "port": 0}
    left = only(check_launcher(case({"SLURM_NTASKS": "4"}, place=place)))
    assert (left.state, left.fix) == (State.FALLBACK, "unset SLURM_NTASKS")
    shell = only(check_launcher(case({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"}, place=place)))
    assert shell.seen == "the shell of SLURM job 12: training starts with srun, in 4 tasks"


def test_the_mirror_needs_a_login(tmp_path: Path) -> None:
    online = write(tmp_path, tracking={"wandb": {"mode": "online"}})
    assert only(check_wandb(case({"HOME": str(tmp_path)}, online))).fix == "wandb login"
    assert only(check_wandb(case({"HOME": str(tmp_path), "WANDB_API_KEY": "x"}, online))).state is State.READY
    assert only(check_wandb(case({"HOME": str(tmp_path), "WANDB_MODE": "offline"}, online))).state is State.READY
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert only(check_wandb(case({"HOME": str(tmp_path)}, online))).state is State.READY
    assert "secret" not in only(check_wandb(case({"HOME": str(tmp_path)}, online))).seen
    assert only(check_wandb(case({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://own.org"}, online))).fix == "wandb login"


def test_a_model_of_the_hub_that_may_not_be_fetched(tmp_path: Path) -> None:
    named = write(tmp_path, model={"from_pretrained": "someone/model"})
    assert only(check_hub(case({"HF_HOME": str(tmp_path)}, named))).fix == "hf download someone/model"
    assert only(check_hub(case({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, named))).stops
    (tmp_path / "hub" / "models--someone--model").mkdir(parents=True)
    assert only(check_hub(case({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, named))).state is State.READY


# ------------------------------------------------------------------------------------------------------------ the sheet


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_found_again_in_the_times_that_it_makes(ranks: int) -> None:
    """From the times that a ring over a link of known rate and latency would take."""
    rate, latency = 3e9, 2e-5
    steps = {2: 1, 4: 2}[ranks]
    times = [
        {"kind": "all_reduce", "bytes": size, "seconds": latency * steps + 2 * (ranks - 1) / ranks * size / rate}
        for size in (4, 1 << 16, 1 << 26)
    ]
    link = link_of([*times, {"kind": "all_gather", "bytes": 4, "seconds": 9.0}], ranks)
    assert link["rate"] == pytest.approx(rate, rel=1e-3)  # the four bytes take no time
    assert link["latency"] == pytest.approx(latency, rel=1e-3)
