"""The sheets of devices next to published figures of the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from tools.published.comparison import Compared, rows_of
from trainer.planner.devices import listed

# The names of the source for devices that have a sheet.
SHEETS = {
    "NVIDIA A100 SXM": "a100-80g",
    "NVIDIA H100 SXM": "h100-80g",
    "NVIDIA H100 SXM (H200 the same)": "h100-80g",
    "NVIDIA H200 SXM": "h200",
    "NVIDIA B200 SXM": "b200",
    "NVIDIA GB200 SXM": "gb200",
    "AMD MI300X": "mi300x",
}
LINKS = {
    "NVLink 3 A100": ("a100-80g", "a100-40g"),
    "NVLink 4 H100/H200/GH200": ("h100-80g", "h200"),
    "NVLink 5 B200/GB200": ("b200", "gb200"),
    "PCIe 4": ("l40s", "rtx4090", "rtx3090"),
    "PCIe 5": ("rtx5090",),
}


def rows(folder: Path) -> Iterator[tuple[str, Compared]]:
    """Yield each published figure of a device that has a sheet, with what it is."""
    for row in rows_of(folder, "hardware_reference"):
        name = SHEETS.get(row["device"])
        if row["kind"] == "max achievable matmul" and name:
            on, peak = listed(name), float(row["peak_tflops"]) * 1e12
            yield "matmul peak", Compared(what=f"{name} {row['dtype']}", published=peak, ours=on.peaks[row["dtype"]])
            if row["dtype"] == "bf16":
                reached = float(row["mamf_tflops"]) * 1e12
                yield "matmul reached", Compared(what=name, published=reached, ours=on.peaks["bf16"] * on.matmul_share)
        elif row["kind"] == "memory" and name:
            on = listed(name)
            rate = float(row["mem_bandwidth_tb_s"]) * 1e12
            yield "memory bandwidth", Compared(what=name, published=rate, ours=on.bandwidth)
        elif row["kind"] == "interconnect uni-directional":
            for sheet in LINKS.get(row["device"], ()):
                published = float(row["uni_gb_s"]) * 1e9
                yield "link inside a node", Compared(what=sheet, published=published, ours=listed(sheet).inside.rate)


def lines(folder: Path) -> Iterator[str]:
    """Yield the table of the sheets' figures."""
    try:
        found = list(rows(folder))
    except FileNotFoundError:
        return
    yield "| sheets | figures | mean difference | largest |"
    yield "|---|---|---|---|"
    for kind in dict.fromkeys(kind for kind, _ in found):
        errors = [abs(one.error) for what, one in found if what == kind]
        yield f"| {kind} | {len(errors)} | {mean(errors):.1%} | {max(errors):.1%} |"
