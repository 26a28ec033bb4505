"""Hostile surroundings: variables, limits, outputs, disks, signals."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tools.campaign.hostile_cases import (
    Case,
    Originals,
    Random,
)

# --------------------------------------------------------------------- environment, limits, signals


def environment(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw variables of launchers and libraries that contradict each other or are invalid."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    slurm = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_RESTART_COUNT")
    others = (
        "DS_ACCELERATOR",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "OMP_NUM_THREADS",
        "HOME",
        "COLUMNS",
    )
    others += (
        "TMPDIR",
        "PYTHONIOENCODING",
        "LC_ALL",
        "TZ",
        "SLURM_JOB_ID",
        "TORCH_LOGS",
        "CUDA_VISIBLE_DEVICES",
        "LANG",
        "TERM",
    )
    odd = ("", "0", "1", "-1", "abc", "99999999999999999999", "1.5", "cuda", "/nowhere", "host name", "1٣", " 0 ", "é", "ascii")
    wanted: dict[str, str | None] = {}
    for name in stream.sample([*launcher, *slurm, *others], stream.choice([1, 2, 3])):
        wanted[name] = stream.choice([None, *odd])
    if wanted.get("WORLD_SIZE") not in (None, "1") or "MASTER_ADDR" in wanted:
        # With a valid rank it would rightly wait for ranks that never come.
        wanted["RANK"] = stream.choice(["", "abc", "5", "-1"])
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    command += ["--set", "guard.timeout_s=20", "--set", "guard.long_timeout_s=20"]
    return Case(f"environment {wanted}", command, folder, environment=wanted)


def limits(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw limits on open files or file sizes, or outputs that are full, closed or of another
    encoding."""
    drawn = stream.choice(["files", "size", "full", "full", "closed", "ascii", "gone"])
    train_it = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run")]
    readers = [
        ["check", str(originals.folder / "recipe.json")],
        ["schema"],
        ["report", str(folder / "copy")],
        ["check", "nothing"],
    ]
    case = Case(drawn, stream.choice([train_it, train_it, *readers]), folder, is_alone=True)
    shutil.copytree(originals.folder / "run", folder / "copy")
    if drawn == "files":
        case.limits["NOFILE"] = stream.choice([10, 12, 16, 20, 24, 32, 48])
    elif drawn == "size":
        case.limits["FSIZE"] = stream.choice([0, 100, 4096, 20_000, 100_000])
    elif drawn == "full":
        case.outputs = {stream.choice([1, 2]): "/dev/full"} if stream.random() < 0.7 else {1: "/dev/full", 2: "/dev/full"}
    elif drawn == "closed":
        case.outputs = {stream.choice([1, 2]): ""}
    elif drawn == "ascii":
        case.environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    else:
        case.in_a_folder_that_is_gone = True
    case.what = f"{case.command[0]} with {drawn} {case.limits or case.outputs or ''}"
    return case


def disk(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw a run whose folder, data or export lies on a disk that is too small for it."""
    small = folder / "disk"
    small.mkdir()
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(small / "run"), "--set", "train.steps=4"]
    if stream.random() < 0.4:
        command += ["--set", f"data.cache_dir={small / 'data'}"]
    if stream.random() < 0.2:
        command = ["export", str(originals.folder / "run"), str(small / "out")]
    kib = stream.choice([4, 16, 40, 64, 100, 160, 250, 400, 600, 800, 1000, 1500])
    return Case(f"{command[0]} on a disk of {kib} KiB", command, folder, is_alone=True, disk=(small, kib))


def signals(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw one or two signals at any moment of a start."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    first = stream.uniform(0.0, 2.5)
    sent = [(first, stream.choice(numbers))]
    if stream.random() < 0.5:
        sent.append((stream.choice([0.0, 0.05, 0.5]), stream.choice(numbers)))
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=30"]
    command += ["--set", f"data.cache_dir={folder / 'cache'}"]
    return Case(f"train, {[signal.Signals(n).name for _, n in sent]} after {first:.2f} s", command, folder, signals=tuple(sent))
