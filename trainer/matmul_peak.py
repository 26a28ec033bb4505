"""The denominator of MFU on this machine: listed for known GPUs, else measured."""

from __future__ import annotations

import statistics
import time

import torch

from trainer.engine import DTYPES
from trainer.flops import Dtype, listed_peak


def device_peak(device: torch.device, dtype: Dtype) -> tuple[float, str]:
    """(FLOP/s of this rank's device, where that figure is from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        listed = listed_peak(name, dtype)
        if listed is not None:
            return listed, f"{name}, {dtype} data sheet"
        return measured_peak(device, dtype), f"{name}, {dtype} matrix product measured"
    threads = torch.get_num_threads()
    return measured_peak(device, dtype), f"CPU, {threads} thread{'s' if threads > 1 else ''}, {dtype} matrix product measured"


def measured_peak(device: torch.device, dtype: Dtype, size: int = 1024, repeats: int = 9) -> float:
    """FLOP/s of square matrix products, median; about a tenth of a second on one CPU core."""
    a, b = (torch.ones(size, size, dtype=DTYPES[dtype], device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])
