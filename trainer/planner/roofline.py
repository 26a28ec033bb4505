"""The time of operations on a device: the larger of what it multiplies and what it moves, and never
less than a kernel's launch. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from trainer.planner.devices import Device
from trainer.planner.operations import Attention, Move, Product, Work

# Tiles of a product [rows × columns] with the share of the rate that they reach: smaller tiles read
# their inputs more often.
TILES = ((256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.8), (64, 64, 0.6))
# Tensor cores need dimensions that are multiples of 8 numbers, and reach their rate at 64 (NVIDIA,
# Deep Learning Performance: Matrix Multiplication Background).
ALIGNED, FULLY_ALIGNED = 8, 64
UNALIGNED_SLOWER, PARTLY_SLOWER = 3.0, 1.15
# The device works while the host issues: of two durations the longer one counts, and a little of
# the other where they are alike.
SOFTNESS = 5
FORWARD_PRODUCTS = 2  # of attention: Q Kᵀ and P V


def product_s(product: Product, device: Device, peak: float, itemsize: int) -> float:
    """Return the seconds of a product."""
    rows, columns, inner, times = product
    rate = peak * device.matmul_share
    compute = (
        product.flops / rate
        if not device.cores
        else min(
            _waves(product, tile_rows, tile_columns, device.cores)
            * 2
            * tile_rows
            * tile_columns
            * inner
            / (rate / device.cores * share)
            for tile_rows, tile_columns, share in TILES
        )
    )
    if device.cores:
        compute *= _misaligned(columns, inner)
    moved = itemsize * times * (rows * inner + inner * columns + rows * columns)
    return max(compute, moved / (device.bandwidth * device.bandwidth_share)) + device.launch


def _waves(product: Product, rows: int, columns: int, cores: int) -> int:
    tiles = math.ceil(product.rows / rows) * math.ceil(product.columns / columns) * product.times
    return math.ceil(tiles / cores)


def _misaligned(*dims: int) -> float:
    """Return how much slower a product with these dims is than one whose rows are aligned."""
    if any(dim % ALIGNED for dim in dims):
        return UNALIGNED_SLOWER
    return PARTLY_SLOWER if any(dim % FULLY_ALIGNED for dim in dims) else 1.0


def moves_s(moves: Iterable[Move], device: Device, dtype: str = "fp32") -> float:
    """Return the seconds of moves; `dtype`: the format of those that name none."""
    speed = device.speed
    if speed is None:
        reached = device.bandwidth * device.bandwidth_share
        return sum(move.num_bytes / reached + move.kernels * device.launch for move in moves)
    formats = [(move, move.dtype or dtype) for move in moves]
    moved = (speed.move_s(move.num_bytes, move.kernels, format, move.kind) for move, format in formats)
    return sum(moved, 0.0) + sum(speed.functions_s(move.functions, format) for move, format in formats)


def attention_s(attention: Attention, device: Device, peak: float, itemsize: int, dtype: str) -> float:
    """Return the seconds of a fused kernel of attention."""
    if device.speed is None:
        if (share := device.attention_share) is None:
            return attention.number * product_s(attention.product, device, peak, itemsize)
        return attention.number * attention.product.flops / (peak * share) + device.launch
    direction = "forward" if attention.number == FORWARD_PRODUCTS else "backward"
    flops = attention.number / FORWARD_PRODUCTS * attention.square_flops
    return device.speed.attention_s(flops, attention.length, attention.head_dim, dtype, direction)


def work_s(work: Work, device: Device, peak: float, itemsize: int, communication: float = 0.0, dtype: str = "fp32") -> float:
    """Return the seconds of a block's operations, with the communication between them, on a device
    that waits for its host where that is slower; on CPUs, which are their own host, one after
    another."""
    speed = device.speed
    if speed is not None:
        products = sum(one.times * speed.product_s(one.rows, one.columns, one.inner, dtype) for one in work.products)
    else:
        # The chunks of a head are many products that are alike.
        products = sum(number * product_s(one, device, peak, itemsize) for one, number in Counter(work.products).items())
    attention = sum(attention_s(one, device, peak, itemsize, dtype) for one in work.attention)
    on_device = products + attention + moves_s(work.moves, device, dtype)
    host = work.calls * device.call if speed is None else speed.calls_s(work.calls)
    return longer(on_device + communication, host) if device.asynchronous else on_device + communication + host


def longer(one: float, other: float) -> float:
    return float((one**SOFTNESS + other**SOFTNESS) ** (1 / SOFTNESS))
