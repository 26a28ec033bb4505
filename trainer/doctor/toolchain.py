"""The check of what compiles extensions: compiler, Python's headers, ninja, CUDA, libaio. No
torch."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.case import Case, Environment
from trainer.doctor.compiler_lines import first_error
from trainer.doctor.findings import Finding, absent, broken, fallback, install, ready

PATIENCE_S = 20.0
STANDARD = "-std=c++20"  # torch's from 2.12 on
TRIAL = "#include <concepts>\n#include <Python.h>\nint main() { return 0; }\n"
AIO_FUNCTION = "io_pgetevents"  # which DeepSpeed calls; libaio has it since 0.3.111
INCLUDED = ("/usr/include", "/usr/local/include")
LINKED = ("/usr/lib64", "/usr/lib", "/lib64", "/lib", "/usr/local/lib", "/usr/local/lib64")


def check_compiler(case: Case) -> Iterator[Finding]:
    """Yield whether a C++ compiler makes what torch's headers need."""
    needed = bool(case.needed_ops)
    command = case.environment.get("CXX") or "c++"
    if not shutil.which(command, path=case.environment.get("PATH")):
        fix = "unset CXX" if case.environment.get("CXX") else install(debian="g++", fedora="gcc-c++", conda="cxx-compiler")
        yield _missing("compiler", f"no {command} on the PATH: extensions cannot be compiled", fix, needed)
        return
    error = compile_error(command, case.environment)
    if not error:
        yield ready("compiler", f"{command}, {_version(command, case.environment)}")
    elif "Python.h" in error:
        yield _missing(
            "compiler",
            f"Python's headers are missing: {error}",
            install(debian="python3-dev", fedora="python3-devel", conda="python"),
            needed,
        )
    else:
        fix = install(debian="g++", fedora="gcc-toolset-13-gcc-c++", conda="cxx-compiler")
        yield _missing("compiler", f"{command} cannot compile C++20: {error}", fix, needed)


def _missing(name: str, seen: str, fix: str, needed: bool) -> Finding:
    """Return a finding about something without which fallbacks run, unless the recipe needs it."""
    return broken(name, seen, fix) if needed else fallback(name, f"{seen}; fallbacks run", fix)


def compile_error(command: str, environment: Environment) -> str:
    """Return the first error of a compiler that is given a small program; "" for none."""
    headers = sysconfig.get_path("include")
    words = [command, STANDARD, "-fsyntax-only", f"-I{headers}", "-x", "c++", "-"]
    try:
        done = subprocess.run(
            words, input=TRIAL, env=dict(environment), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except OSError as error:
        return f"{command}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{command}: no answer in {PATIENCE_S:.0f} s"
    return first_error(done.stderr) if done.returncode else ""


def _version(command: str, environment: Environment) -> str:
    try:
        done = subprocess.run(
            [command, "--version"], env=dict(environment), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "version unknown"
    return (done.stdout.splitlines() or ["version unknown"])[0]


def check_ninja(case: Case) -> Iterator[Finding]:
    """Yield whether ninja is where torch looks for it: on the PATH."""
    path = case.environment.get("PATH")
    beside = Path(sys.executable).with_name("ninja")
    if found := shutil.which("ninja", path=path):
        yield ready("ninja", found)
    elif beside.is_file():
        yield _missing("ninja", f"{beside} is not on the PATH", f'export PATH="{beside.parent}:$PATH"', bool(case.needed_ops))
    else:
        yield _missing("ninja", "not on the PATH: extensions cannot be compiled", "pip install ninja", bool(case.needed_ops))


def check_cuda_home(case: Case) -> Iterator[Finding]:
    """Yield whether CUDA's compiler is there, and fits torch."""
    wanted = case.seen.get("torch", {}).get("cuda")
    named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if case.environment.get(name)), None)
    if named:
        compiler = Path(case.environment[named]) / "bin" / "nvcc"
        if not compiler.is_file():
            seen = f"{named}={case.environment[named]}, but {compiler} is not there: no extension for GPUs can be compiled"
            yield broken("CUDA_HOME", seen, f"unset {named}", needed=bool(wanted and case.needed_ops))
            return
    else:
        compiler = Path(shutil.which("nvcc", path=case.environment.get("PATH")) or "/usr/local/cuda/bin/nvcc")
    version = _nvcc(compiler)
    if not wanted:
        yield absent("CUDA", f"torch is built without it{f'; {compiler} is {version}' if version else ''}")
    elif not version:
        yield _missing(
            "CUDA",
            "no nvcc: extensions for GPUs cannot be compiled",
            f"conda install -y -c nvidia cuda-nvcc={wanted}",
            bool(case.needed_ops),
        )
    elif version.split(".")[0] != wanted.split(".")[0]:
        seen = f"{compiler} is {version}, and torch is built with {wanted}: extensions for GPUs cannot be compiled"
        yield _missing("CUDA", seen, f"conda install -y -c nvidia cuda-nvcc={wanted}", bool(case.needed_ops))
    else:
        yield ready("CUDA", f"{compiler}, {version}")


def _nvcc(compiler: Path) -> str:
    try:
        done = subprocess.run([str(compiler), "-V"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else ""


def check_libaio(case: Case) -> Iterator[Finding]:
    """Yield whether libaio is there to compile DeepSpeed's NVMe extension, and new enough."""
    fix = install(debian="libaio-dev", fedora="libaio-devel", conda="libaio")
    threads = "NVMe offload reads and writes with threads"
    header = _first_file(
        "libaio.h", [*_listed(case.environment, "CPATH"), *_flagged(case.environment, "CFLAGS", "-I"), *INCLUDED]
    )
    folders = [*_listed(case.environment, "LIBRARY_PATH"), *_flagged(case.environment, "LDFLAGS", "-L"), *_linked()]
    library = _first_file("libaio.so", folders)
    if not (header and library):
        lack = " and ".join(name for name, there in (("libaio.h", header), ("libaio.so", library)) if not there)
        yield fallback("libaio", f"{lack} not found: {threads}", fix)
    elif AIO_FUNCTION not in header.read_text(errors="replace") or not _has(library, AIO_FUNCTION):
        yield fallback("libaio", f"{library} is older than 0.3.111: it lacks {AIO_FUNCTION}, so {threads}", fix)
    else:
        yield ready("libaio", f"{header}, {library}")


def _linked() -> tuple[str, ...]:
    return (
        *LINKED,
        *(f"{folder}/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}" for folder in LINKED),
        f"{sys.prefix}/lib",
    )


def _listed(environment: Environment, name: str) -> list[str]:
    return [folder for folder in environment.get(name, "").split(os.pathsep) if folder]


def _flagged(environment: Environment, name: str, flag: str) -> list[str]:
    return [word.removeprefix(flag) for word in environment.get(name, "").split() if word.startswith(flag)]


def _first_file(name: str, folders: list[str]) -> Path | None:
    return next((path for folder in folders if (path := Path(folder) / name).is_file()), None)


def _has(library: Path, function: str) -> bool:
    try:
        return hasattr(ctypes.CDLL(str(library)), function)
    except OSError:  # a script of the linker, or another machine's library
        return False
