"""The check of torch, of its devices, and of the libraries by which ranks talk. No torch: a process
of its own has looked (`probe.py`)."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, absent, broken, fallback, ready
from trainer.files.mounts import mount_of

NVIDIA = Path("/proc/driver/nvidia/gpus")
TAKEN_SHARE = 0.1  # of a GPU's memory, by others, that is worth a line
SLOW_IMPORT_S = 15.0
FIRST_WITH_BF16 = (8, 0)  # compute capability: Ampere
CUDA_WHEEL = "pip install --force-reinstall torch"
DRIVER_AND_CUDA = "nvidia-smi"  # its head says up to which CUDA the driver goes
USERS = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"


def check_torch(case: Case) -> Iterator[Finding]:
    """Yield whether torch can be imported, and in what time."""
    torch = case.seen.get("torch", {})
    if error := torch.get("error"):
        yield broken("torch", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    kind = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPUs alone"
    seen = f"{torch['version']}, built for {kind}; imported in {torch['seconds']:.1f} s"
    mount = mount_of(Path(torch["folder"]))
    if torch["seconds"] > SLOW_IMPORT_S and mount.is_shared:
        yield fallback(
            "torch",
            f"{seen} from {mount.folder} ({mount.kind}), on every rank: put the environment on a local disk",
            "python -m venv /tmp/env && /tmp/env/bin/pip install -e .",
        )
    else:
        yield ready("torch", seen)


def check_accelerators(case: Case) -> Iterator[Finding]:
    """Yield the devices that torch sees, and those that it does not see."""
    if "error" in case.seen.get("torch", {}):
        return
    looked = case.seen.get("devices", {})
    devices = looked.get("devices", [])
    if error := looked.get("error"):
        yield broken("accelerators", f"torch cannot look for them: {error}", "nvidia-smi")
    elif devices:
        yield from _devices(case, devices, looked.get("built_for", []))
    else:
        yield _none_seen(case)


def _devices(case: Case, devices: list[Mapping[str, Any]], built_for: list[str]) -> Iterator[Finding]:
    counts = Counter(f"{device['name']}, {device['memory'] / 2**30:.0f} GiB, {device['capability']}" for device in devices)
    yield ready("accelerators", "; ".join(f"{count} × {name}" for name, count in counts.items()))
    for number, device in enumerate(devices):
        name = f"GPU {number}"
        architecture = f"sm_{device['capability'].replace('.', '')}"
        if error := device.get("error"):
            known = (
                f" (this torch has code for {', '.join(built_for)}, not {architecture})"
                if architecture not in built_for
                else ""
            )
            yield broken(name, f"runs no kernel: {error}{known}", CUDA_WHEEL if known else "nvidia-smi")
        elif device["memory"] - device["free"] > max(TAKEN_SHARE * device["memory"], 2 << 30):
            taken = (device["memory"] - device["free"]) / 2**30
            yield fallback(name, f"{taken:.0f} of its {device['memory'] / 2**30:.0f} GiB are taken, by others", USERS)
        if "MIG" in device["name"].split():
            yield fallback(name, "is a slice of a GPU (MIG): NCCL joins no slices of one GPU, so one rank a node can use it")
    if case.recipe and case.recipe.precision.dtype == "bf16":
        old = {device["name"] for device in devices if _capability(device) < FIRST_WITH_BF16}
        for name in sorted(old):
            yield fallback(
                "bf16",
                f"{name} has no instructions for it and computes it slowly",
                "triaxis train RECIPE --set precision.dtype=fp16",
            )


def _capability(device: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in device["capability"].split("."))


def _none_seen(case: Case) -> Finding:
    """Return why torch sees no device: there is none, it is hidden, or torch cannot use it."""
    there = _gpus_there()
    if not there:
        return absent("accelerators", "no GPU here: training runs on the CPU")
    hidden = case.environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip():
        return absent("accelerators", f"{there}, hidden by CUDA_VISIBLE_DEVICES=", "unset CUDA_VISIBLE_DEVICES")
    if case.seen["torch"]["cuda"] is None:
        return broken("accelerators", f"{there}, but this torch is built for CPUs alone", CUDA_WHEEL)
    if hidden is not None:
        seen = f"{there}, but CUDA_VISIBLE_DEVICES={hidden} names none of them"
        return broken("accelerators", seen, "unset CUDA_VISIBLE_DEVICES")
    return broken(
        "accelerators",
        f"{there}, but torch {case.seen['torch']['version']} cannot use it: is the driver new enough? Update it, or install a "
        "torch that is built for the CUDA that this shows",
        DRIVER_AND_CUDA,
    )


def _gpus_there() -> str:
    """Return the GPUs that the driver knows; "" if there is none, or no driver."""
    if shutil.which("nvidia-smi"):
        try:
            command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
            said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "nvidia-smi does not answer"
        names = Counter(line.strip() for line in said.stdout.splitlines() if line.strip())
        if said.returncode == 0 and names:
            return "; ".join(f"{count} × {name}" for name, count in names.items())
    cards = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    return f"{cards} NVIDIA GPUs" if cards else ""


def check_backends(case: Case) -> Iterator[Finding]:
    """Yield the libraries of collectives that torch was built with."""
    torch = case.seen.get("torch", {})
    if "error" in torch or not torch:
        return
    there = torch["backends"]
    gpus = bool(case.gpus)
    if not there["gloo"]:
        yield broken(
            "gloo", "this torch has none: ranks on CPUs cannot talk", "pip install --force-reinstall torch", needed=not gpus
        )
    elif error := case.seen.get("gloo", {}).get("error"):
        yield broken(
            "gloo", f"cannot start: {error.splitlines()[0]}", f"export GLOO_SOCKET_IFNAME={_interface()}", needed=not gpus
        )
    else:
        yield ready("gloo", "starts")
    if there["nccl"]:
        yield ready("NCCL", "in this torch")
    elif gpus:
        yield broken("NCCL", "this torch has none: ranks on GPUs cannot talk", CUDA_WHEEL)
    else:
        yield absent("NCCL", "not in this torch, and there is no GPU")
    if not there["mpi"]:
        yield absent("MPI", "not in this torch: mpirun starts ranks all the same, which talk by gloo or NCCL")


def _interface() -> str:
    """Return the first network interface that is not the loopback, if there is one."""
    import socket

    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name != "lo"), "lo")
