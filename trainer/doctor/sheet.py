"""The sheet of this machine: what was measured, and the figures of its device in the form of all
sheets. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError
from trainer.files.durable import make_private, write_json
from trainer.files.reading import told
from trainer.planner.devices import HERE, HERE_VERSION

LARGE = 1 << 26  # bytes of a copy that no cache holds

Figures = Mapping[str, Any]


def sheet_of(alone: Figures, pair: Figures | None, disk: Figures | None, machine: Figures) -> dict[str, Any]:
    """Return the content of the file.

    Under "here" is the device with one rank on the machine, as a planner takes it; its shares are
    1, because its rates are measured and not listed. Under "measured" is all that was measured. On
    CPUs the planner reads the speeds of ranks on the cores there too.
    """
    link = link_of(pair["collectives"], pair["ranks"]) if pair else {"rate": 1e9, "latency": 1e-4, "share": 1.0}
    device = {
        "peaks": dict(alone["peaks"]),
        "matmul_share": 1.0,
        "cores": machine["cores"],
        "memory": machine["memory"],
        "bandwidth": _bandwidth(alone["copies"]),
        "bandwidth_share": 1.0,
        "launch": alone["launch_s"],
        "call": alone["call_s"],
        "inside": link,
        "outside": link,
        "per_node": machine["per_node"],
        "asynchronous": machine["cores"] > 0,
        "host_adam": alone["adam_elements_per_s"],
        "to_device": alone.get("to_device_bytes_per_s"),
        "to_host": alone.get("to_host_bytes_per_s"),
        # What is swapped goes through the system's memory (`engine.threaded_io`).
        "nvme_read": disk and disk["cached_read_bytes_per_s"],
        "nvme_write": disk and disk["cached_write_bytes_per_s"],
        "sources": [
            f"triaxis doctor --measure on {machine['host']}, {machine['when']}: {machine['device']}, torch {machine['torch']}",
            "inside: two ranks on this machine" if pair else "inside: not measured, assumed",
            "outside: not measured, taken from inside",
        ],
    }
    measured = {"alone": alone, "pair": pair, "disk": disk, "machine": machine}
    return {"version": HERE_VERSION, HERE: device, "measured": measured}


def _bandwidth(copies: Sequence[Figures]) -> float:
    """Return the median rate of the copies that are too large for a cache."""
    rates = sorted(float(copy["bytes_per_s"]) for copy in copies if copy["bytes"] >= LARGE)
    return rates[len(rates) // 2]


def link_of(collectives: Sequence[Figures], ranks: int) -> dict[str, float]:
    """Return the rate [bytes/s] and latency [s] of the link under a ring, from its all-reduces.

    A ring of n ranks sends 2 (n − 1) / n of the tensor over each link, and the smallest message
    takes the latency, log2(n) times. The rate is that of the largest message, the latency that of
    the smallest.
    """
    sums = sorted((one for one in collectives if one["kind"] == "all_reduce"), key=lambda one: one["bytes"])
    latency = sums[0]["seconds"] / math.log2(ranks)
    moved = 2 * (ranks - 1) / ranks * sums[-1]["bytes"]
    return {"rate": moved / max(sums[-1]["seconds"] - sums[0]["seconds"], 1e-9), "latency": latency, "share": 1.0}


def summary(sheet: Figures) -> Iterator[str]:
    """Yield what the file says, in a few lines."""
    device, measured = sheet[HERE], sheet["measured"]
    alone, pair, disk = (measured[name] for name in ("alone", "pair", "disk"))
    yield f"measured in {measured['machine']['took_s']:.0f} s: {measured['machine']['device']}"
    for dtype, peak in device["peaks"].items():
        small = next(product for product in alone["products"] if product["dtype"] == dtype)
        side = small["rows"]
        yield f"  {dtype} products   {_rate(peak, 'FLOP/s')} at best, {_rate(small['flops_per_s'], 'FLOP/s')} of side {side}"
    yield f"  memory          {_rate(device['bandwidth'], 'B/s')} read and written"
    yield f"  an operation    {device['call'] * 1e6:.1f} µs to issue"
    yield f"  Adam on the CPU {_rate(alone['adam_elements_per_s'], 'weights/s')}"
    if pair:
        link = device["inside"]
        yield f"  two ranks       {_rate(link['rate'], 'B/s')} and {link['latency'] * 1e6:.0f} µs by {pair['backend']}"
    if disk:
        write, read = _rate(disk["write_bytes_per_s"], "B/s"), _rate(disk["read_bytes_per_s"], "B/s")
        yield f"  disk            {write} written, {read} read, {disk['sync_s'] * 1e3:.1f} ms to sync"


def _rate(value: float, unit: str) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}" if unit[0].isupper() else f"{value / size:.3g} {letter} {unit}"
    return f"{value:.3g} {unit}"


def write_sheet(path: Path, sheet: Figures) -> None:
    """Write the file. RecipeError if that is not possible."""
    try:
        make_private(path.absolute().parent)
        write_json(path, sheet)
    except OSError as error:
        raise RecipeError(f"--sheet {path}: {told(error)}: name a file that can be written") from error
