"""The measurement of this machine: its device alone, two ranks beside each other, and its disk."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.doctor.disk_speed import disk_speed
from trainer.doctor.limits import memory_limit
from trainer.doctor.rank_speed import rank_speed
from trainer.doctor.sheet import sheet_of
from trainer.doctor.speed import FORMATS, gpu_speed, operations, peaks_of
from trainer.files.mounts import existing
from trainer.files.reading import told
from trainer.launch.ports import held_port

PAIR_PATIENCE_S = 120.0


def measure(run_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the sheet of this machine. It takes about a minute."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as `train` does
    start = time.monotonic()
    say(f"measuring {_device_name(device)}: matrix products, memory, operations")
    alone = _alone(device)
    busy = os.getloadavg()[0]
    if (cores := len(os.sched_getaffinity(0))) < busy:
        say(f"warning: {busy:.0f} processes share the {cores} cores here: figures are too low; measure again when it is quiet")
    say("measuring two ranks beside each other")
    pair = _pair(say)
    folder = existing(run_dir)
    say(f"measuring the disk of {folder}")
    try:
        disk = disk_speed(folder)
    except OSError as error:
        say(f"{folder}: {told(error)}: no figures of the disk")
        disk = None
    return sheet_of(alone, pair, disk, _machine(device) | {"took_s": round(time.monotonic() - start, 1)})


def _alone(device: torch.device) -> dict[str, Any]:
    """Return the figures of one rank that has the machine for itself."""
    speed = gpu_speed(device) if device.type == "cuda" else {**operations(device), **rank_speed(1, FORMATS)}
    return {**speed, "peaks": peaks_of(speed["products"])}


def _machine(device: torch.device) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_properties(device) if on_gpu else None
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "host": platform.node(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": _device_name(device),
        "torch": str(torch.__version__),
        "host_cores": cores,
        "host_memory": memory_limit(there),
        "cores": card.multi_processor_count if card else 0,
        "memory": card.total_memory if card else memory_limit(there),
        "per_node": torch.cuda.device_count() if on_gpu else cores,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{named[1] if named else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _pair(say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return what two ranks measure; None if they cannot be started."""
    with held_port() as port:
        command = [sys.executable, "-m", "trainer.doctor.pair"]
        ranks = [
            subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        noise = ""
        try:
            answer, noise = ranks[0].communicate(timeout=PAIR_PATIENCE_S)
            figures: dict[str, Any] = json.loads(answer)
            return figures
        except (ValueError, subprocess.TimeoutExpired):
            lines = [line.strip() for line in noise.splitlines() if line.strip()]
            say(f"two ranks could not be measured: {lines[-1] if lines else 'no answer'}")
            return None
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
