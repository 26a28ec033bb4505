"""The speed of one device, measured: matrix products by size, memory, issued operations, updates of
Adam.

Of the times of an action the lower quartile counts: what else runs for a moment leaves no trace,
and no lucky single one decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.engine.execution import DTYPES
from trainer.schema import Dtype

Figures = dict[str, Any]
BUDGET_S = 0.25  # of one figure
FEWEST, MOST = 4, 20_000  # repeats
FORMATS: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Shape:
    """`count` products [rows, inner] · [inner, columns]ᵀ, as a linear layer and attention have."""

    rows: int
    columns: int
    inner: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.inner * self.count


# Squares tell the peak and how soon it is reached; the others are those of small models: few
# tokens, a narrow hidden size, the gradient of a weight, attention by heads.
ON_HOST = (
    *(Shape(n, n, n) for n in (32, 64, 128, 256, 512, 1024)),
    *(Shape(64, 1024, 1024), Shape(512, 256, 64), Shape(64, 256, 512), Shape(1024, 64, 1024)),
    *(Shape(2048, 256, 256), Shape(256, 2048, 512), Shape(2048, 2048, 512), Shape(512, 512, 2048)),
)
ON_GPU = (
    *(Shape(n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)),
    *(Shape(2048, 12288, 4096), Shape(2048, 4096, 1024), Shape(16384, 4096, 4096), Shape(4096, 1024, 8192)),
    *(Shape(1024, 1024, 128, 64), Shape(2048, 2048, 128, 32)),
)
MOVED_BYTES = tuple(1 << n for n in (16, 20, 23, 25, 27, 28))
ADAM_ELEMENTS = 8_000_000
CHAIN = 200  # operations, one after another


def gpu_speed(device: torch.device) -> Figures:
    """Return the figures of a GPU, with its host's."""
    size = 1 << 28
    host = torch.zeros(size // 4, pin_memory=True)
    there = torch.zeros(size // 4, device=device)
    return {
        "threads": torch.get_num_threads(),
        "products": list(_products(device)),
        **operations(device),
        "to_device_bytes_per_s": size / typical_s(lambda: there.copy_(host, non_blocking=True), device),
        "to_host_bytes_per_s": size / typical_s(lambda: host.copy_(there, non_blocking=True), device),
        "adam_on_device_elements_per_s": adam_rate(device),
    }


def peaks_of(products: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the best rate of each format [FLOP/s]."""
    return {dtype: max(found) for dtype in FORMATS if (found := _rates(products, dtype))}


def operations(device: torch.device) -> Figures:
    """Return what copies of any size and operations on next to nothing take, and updates of Adam on
    the host."""
    return {
        "copies": [{"bytes": size, "bytes_per_s": copy_rate(device, size)} for size in MOVED_BYTES],
        "call_s": call_s(device),
        "launch_s": launch_s(device),
        "autograd_s": autograd_s(device),
        "adam_elements_per_s": adam_rate(torch.device("cpu")),
    }


def _rates(products: Sequence[Mapping[str, Any]], dtype: Dtype) -> list[float]:
    return [product["flops_per_s"] for product in products if product["dtype"] == dtype]


def _products(device: torch.device) -> Iterator[Figures]:
    """Yield the rate of each shape in each format. Where a format is slow (fp16 on most CPUs) its
    large shapes are left out."""
    for dtype in FORMATS:
        slowest = float("inf")
        for shape in ON_GPU:
            if shape.flops / slowest > 4 * BUDGET_S:
                continue
            seconds = product_s(device, shape, dtype)
            slowest = min(slowest, shape.flops / seconds) if shape.flops > 1e6 else slowest
            yield {"dtype": dtype, **asdict(shape), "flops_per_s": shape.flops / seconds}


def product_s(device: torch.device, shape: Shape, dtype: Dtype) -> float:
    """Return the seconds of a product."""
    kind = DTYPES[dtype]
    left = torch.ones(shape.count, shape.rows, shape.inner, dtype=kind, device=device)
    right = torch.ones(shape.count, shape.columns, shape.inner, dtype=kind, device=device)
    if shape.count == 1:
        left, right = left[0], right[0]
    return typical_s(lambda: left @ right.mT, device)


def copy_rate(device: torch.device, size: int) -> float:
    """Return the bytes read and written a second by a copy of so many bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / typical_s(lambda: target.copy_(source), device)


def call_s(device: torch.device) -> float:
    """Return the seconds until the host has issued an operation on one number, and goes on."""
    one = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(CHAIN):
            one.add_(1)

    _wait(device)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        chain()
        times.append(time.perf_counter() - start)
        _wait(device)
    return lower_quartile(times) / CHAIN


def launch_s(device: torch.device) -> float:
    """Return the least seconds of a kernel; on a CPU, which does not queue, those of a call."""
    if device.type != "cuda":
        return call_s(device)
    few = torch.zeros(1 << 14, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CHAIN):
            few.add_(1)
    return typical_s(graph.replay, device) / CHAIN


def autograd_s(device: torch.device) -> dict[str, float]:
    """Return the seconds of a small operation under autograd, forward and backward."""
    weight = torch.ones(64, device=device, requires_grad=True)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        value = weight
        for _ in range(CHAIN):
            value = value * weight
        _wait(device)
        middle = time.perf_counter()
        value.sum().backward()
        _wait(device)
        times.append((middle - start, time.perf_counter() - middle))
    forward, backward = (lower_quartile(column) / CHAIN for column in zip(*times, strict=True))
    return {"forward": forward, "backward": backward}


def adam_rate(device: torch.device) -> float:
    """Return the weights that torch's fused AdamW, with fp32 states, updates in a second."""
    weight = torch.zeros(ADAM_ELEMENTS, device=device, requires_grad=True)
    weight.grad = torch.full_like(weight, 1e-3)
    rule = torch.optim.AdamW([weight], fused=True)
    return ADAM_ELEMENTS / typical_s(rule.step, device)


def typical_s(action: Callable[[], object], device: torch.device, budget_s: float = BUDGET_S) -> float:
    """Return the seconds of an action that is repeated for about `budget_s`. Its first run sets
    things up, and does not count."""
    timed_s(action, device)
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < FEWEST or (time.perf_counter() < end and len(times) < MOST):
        times.append(timed_s(action, device))
    return lower_quartile(times)


def timed_s(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the action is done, on the device too."""
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def lower_quartile(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 4]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
