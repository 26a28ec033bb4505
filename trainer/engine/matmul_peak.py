"""The denominator of MFU on this machine: a listed figure for known GPUs, else a measured one."""

from __future__ import annotations

import statistics
import time

import torch

from parallel.products import product
from trainer.costs.flops import listed_peak
from trainer.engine.execution import DTYPES
from trainer.schema import Dtype, ProductFormat


def device_peak(device: torch.device, products: ProductFormat) -> tuple[float, str]:
    """Return the peak [FLOP/s] of this rank's device in the format that it is set to multiply
    matrices in, and the source of the figure."""
    dtype: Dtype = "fp32" if products == "tf32" else products
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        listed = listed_peak(name, products)
        if listed is not None:
            return listed, f"{name}, {products} data sheet"
        return measured_peak(device, dtype), f"{name}, {products} matrix product measured"
    threads = torch.get_num_threads()
    return measured_peak(device, dtype), f"CPU, {threads} thread{'s' if threads > 1 else ''}, {dtype} matrix product measured"


def slower_than_fp32(device: torch.device, dtype: Dtype, peak: float) -> str | None:
    """Return a remark for a CPU without instructions for a half format, where fp32 is many times
    faster; None elsewhere."""
    if device.type != "cpu" or dtype == "fp32":
        return None
    fp32 = measured_peak(device, "fp32")
    if peak > fp32 / 2:
        return None
    return (
        f"precision.dtype: {dtype} matrix products run at {peak / 1e9:.3g} GFLOP/s on this CPU, fp32 ones at {fp32 / 1e9:.3g}; "
        "fp32 trains faster here"
    )


def measured_peak(device: torch.device, dtype: Dtype, size: int = 1024, repeats: int = 9, patience_s: float = 0.5) -> float:
    """Return the median speed [FLOP/s] of square matrix products. It takes about a tenth of a
    second on one CPU core.

    Where products are slow (bf16 on a CPU without instructions for it runs at a hundredth of fp32),
    smaller ones are measured, so that it takes about `patience_s`.
    """
    for attempt in (128, 256, 512, size):
        a, b = (torch.ones(attempt, attempt, dtype=DTYPES[dtype], device=device) for _ in range(2))
        # The least of three: the first call sets up, and any may be disturbed.
        if min(_product_s(a, b) for _ in range(3)) * 8 > patience_s / repeats:
            break
    return 2 * attempt**3 / statistics.median(_product_s(a, b) for _ in range(repeats))


def _product_s(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    product(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
