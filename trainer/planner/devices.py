"""The machines that are planned for, as sheets of figures with their sources (devices.json). No
torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError
from trainer.planner.calibration import factor_of
from trainer.spelling import nearest

SHEETS = Path(__file__).with_name("devices.json")
# A word in the driver's name of a card, and the sheets of its sizes of memory. Variants of a chip
# with other rates have no sheet.
CARDS = {
    "V100": ("v100-32g", "v100-16g"),
    "A100": ("a100-80g", "a100-40g"),
    "H100": ("h100-80g",),
    "H200": ("h200",),
    "B200": ("b200",),
    "GB200": ("gb200",),
    "MI300X": ("mi300x",),
    "L40S": ("l40s",),
    "4090": ("rtx4090",),
    "3090": ("rtx3090",),
    "5090": ("rtx5090",),
}
VARIANTS = frozenset(("PCIE", "NVL", "MIG", "TI", "D", "LAPTOP", "MOBILE", "VF"))
NEARLY = 0.1  # what a driver reports is a little less than the size in a card's name


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection of a device to others: bytes/s in one direction, and seconds until the first
    byte arrives. `share`: what collectives reach of the rate."""

    rate: float
    latency: float
    share: float

    @property
    def reached(self) -> float:
        return self.rate * self.share


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device in its node.

    | field | meaning |
    |---|---|
    | `peaks` | dense matrix products by format [FLOP/s], from the data sheet |
    | `matmul_share` | what large products reach of the peak |
    | `cores` | units that each take a tile of a product; 0: products are not cut into tiles |
    | `memory` | [bytes] |
    | `bandwidth`, `bandwidth_share` | of its memory [bytes/s], and what kernels reach of it |
    | `launch` | the least time of a kernel [s] |
    | `call` | the host's time to issue an operation from Python [s] |
    | `inside`, `outside` | the links to devices of the same node and of others |
    | `per_node` | devices in a node |
    | `asynchronous` | whether it works while the host issues; not so a CPU, or under `CUDA_LAUNCH_BLOCKING=1` |
    | `calibration` | the measured time of a step over the computed one, taken from one run |
    """

    name: str
    peaks: Mapping[str, float]
    matmul_share: float
    cores: int
    memory: int
    bandwidth: float
    bandwidth_share: float
    launch: float
    call: float
    inside: Link
    outside: Link
    per_node: int
    asynchronous: bool = True
    calibration: float = 1.0


@cache
def sheets() -> dict[str, dict[str, Any]]:
    """Return the sheets by name, as they are written, with their sources."""
    found: dict[str, dict[str, Any]] = json.loads(SHEETS.read_text(encoding="utf-8"))
    return found


def device(name: str, how: str = "--device") -> Device:
    """Return the device of that name, which is known from `how`, calibrated by a run of this user
    if there was one. RecipeError with the nearest names if there is none."""
    return replace(listed(name, how), calibration=factor_of(name, os.environ))


def listed(name: str, how: str = "--device") -> Device:
    """Return the device of that name as its sheet has it."""
    if name not in sheets():
        begun = [known for known in sheets() if name and known.startswith(name)]
        meant = " or ".join(begun) or nearest(name, list(sheets()))
        guess = f"; did you mean {meant}?" if meant else ""
        raise RecipeError(f"{how} {name}: no sheet has this name{guess}; legal: {', '.join(sheets())}")
    sheet = {key: value for key, value in sheets()[name].items() if key != "sources"}
    return Device(name=name, **{**sheet, "inside": Link(**sheet["inside"]), "outside": Link(**sheet["outside"])})


def device_named_by_driver(card: str, memory: int) -> Device | None:
    """Return the device of a card with so many bytes, by the driver's name, such as "NVIDIA
    A100-SXM4-80GB"; None where no sheet is of this card."""
    words = set(re.split(r"[\s-]+", card.upper()))
    if words & VARIANTS:
        return None
    known = (device(name) for word, names in CARDS.items() if word in words for name in names)
    return next((one for one in known if abs(memory - one.memory) < NEARLY * one.memory), None)
