"""A sheet of a machine of two cores, as `triaxis doctor --measure` writes it, with round figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.planner.devices import HERE_VERSION

PRODUCTS = {(64, 64, 64): 50e9, (1024, 1024, 1024): 100e9}
ALL_REDUCES = {4: 1e-4, 1 << 20: 1e-3, 1 << 26: 64e-3}


def speeds(ranks: int) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "threads": 1,
        "products": [
            {"dtype": "fp32", "rows": r, "columns": c, "inner": i, "count": 1, "flops_per_s": rate}
            for (r, c, i), rate in PRODUCTS.items()
        ],
        "attention": [
            {"dtype": "fp32", "length": n, "head_dim": 64, "forward_flops_per_s": 80e9, "backward_flops_per_s": 90e9}
            for n in (64, 1024)
        ],
        "moves": [
            {"kind": kind, "dtype": "fp32", "bytes": size, "bytes_per_s": rate}
            for kind, rate in (("fresh", 20e9), ("reused", 40e9), ("joined", 10e9))
            for size in (1 << 16, 1 << 26)
        ],
        "functions_per_s": {"fp32": 5e9},
        "adam": [{"elements": 1 << 20, "elements_per_s": 2e9}],
        "call_s": 3e-6,
        "steady": {"seconds": 22e-3, "quartile_s": 20e-3},
    }


def content() -> dict[str, Any]:
    link = {"rate": 2e9, "latency": 1e-4, "share": 1.0}
    device = {
        "peaks": {"fp32": 100e9},
        "matmul_share": 1.0,
        "cores": 0,
        "memory": 16 << 30,
        "bandwidth": 40e9,
        "bandwidth_share": 1.0,
        "launch": 2e-6,
        "call": 2e-6,
        "inside": link,
        "outside": link,
        "per_node": 2,
        "asynchronous": False,
        "host_adam": 2e9,
        "to_device": None,
        "to_host": None,
        "nvme_read": 2e9,
        "nvme_write": 1e9,
        "sources": ["a test"],
    }
    collectives = [
        {"kind": kind, "bytes": size, "seconds": seconds}
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "send_and_back")
        for size, seconds in ALL_REDUCES.items()
    ]
    pair = {**speeds(2), "backend": "gloo", "collectives": collectives}
    measured = {"alone": speeds(1), "pair": pair, "disk": None, "machine": {}}
    return {"version": HERE_VERSION, "here": device, "measured": measured}


def write(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content(), **changes}))
    return path
