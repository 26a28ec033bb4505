"""The machines that are planned for, as sheets of figures with their sources (devices.json). No
torch."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError
from trainer.files.paths import here_sheet
from trainer.files.reading import RECIPE_BYTES, read_json
from trainer.planner.calibration import factor_of
from trainer.planner.speeds import Speeds, Table
from trainer.spelling import nearest

HERE = "here"  # the name of this machine
HERE_VERSION = 2  # of the sheet that `triaxis doctor --measure` writes
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
    byte arrives. `share`: what collectives reach of the rate.

    `measured`: seconds of collectives of two ranks by their names and bytes, where they were
    measured; rate and latency are then not used for them.
    """

    rate: float
    latency: float
    share: float
    measured: Mapping[str, Table] = field(default_factory=dict)

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
    | `attention_share` | what a fused kernel of attention reaches of the peak; None: what products reach |
    | `cores` | units that each take a tile of a product; 0: products are not cut into tiles |
    | `memory` | [bytes] |
    | `bandwidth`, `bandwidth_share` | of its memory [bytes/s], and what kernels reach of it |
    | `launch` | the least time of a kernel [s] |
    | `call` | the host's time to issue an operation from Python [s] |
    | `inside`, `outside` | the links to devices of the same node and of others |
    | `per_node` | devices in a node |
    | `asynchronous` | whether it works while the host issues; not so a CPU, or under `CUDA_LAUNCH_BLOCKING=1` |
    | `to_device`, `to_host` | from the host's page-locked memory to the device's, and back [bytes/s] |
    | `host_adam` | weights that Adam updates in the host's memory, for this device [weights/s] |
    | `nvme_read`, `nvme_write` | of the node's disks, for this device [bytes/s] |
    | `speeds` | of ranks on the cores of a machine, by how many work at once; (): the device is a GPU |
    | `jitter` | the standard deviation of a step's time from rank to rank, as a share of it |
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
    attention_share: float | None = None
    asynchronous: bool = True
    to_device: float | None = None
    to_host: float | None = None
    host_adam: float | None = None
    nvme_read: float | None = None
    nvme_write: float | None = None
    speeds: tuple[Speeds, ...] = ()
    jitter: float = 0.0
    calibration: float = 1.0

    @property
    def is_gpu(self) -> bool:
        return not self.speeds

    def shared_by(self, ranks: int) -> Device:
        """Return the device as each of so many ranks finds it: those on one machine's cores take
        them from each other."""
        if not self.speeds:
            return self
        measured = max((speed for speed in self.speeds if speed.ranks <= ranks), key=lambda speed: speed.ranks)
        return replace(self, speeds=(measured.shared_by(ranks),), per_node=ranks)

    @property
    def speed(self) -> Speeds | None:
        """The measured speed of each rank, on CPUs."""
        return self.speeds[0] if self.speeds else None


@cache
def sheets() -> dict[str, dict[str, Any]]:
    """Return the sheets by name, as they are written, with their sources."""
    found: dict[str, dict[str, Any]] = json.loads(SHEETS.read_text(encoding="utf-8"))
    return found


def device(name: str, how: str = "--device") -> Device:
    """Return the device of that name, which is known from `how`, calibrated by a run of this user
    if there was one. RecipeError with the nearest names if there is none."""
    found = here(here_sheet(os.environ), how) if name == HERE else listed(name, how)
    return replace(found, calibration=factor_of(name, os.environ))


def listed(name: str, how: str = "--device") -> Device:
    """Return the device of that name as its sheet has it."""
    if name not in sheets():
        names = [*sheets(), HERE]
        begun = [known for known in names if name and known.startswith(name)]
        meant = " or ".join(begun) or nearest(name, names)
        guess = f"; did you mean {meant}?" if meant else ""
        raise RecipeError(f"{how} {name}: no sheet has this name{guess}; legal: {', '.join(names)}")
    sheet = {key: value for key, value in sheets()[name].items() if key != "sources"}
    return Device(name=name, **{**sheet, "inside": Link(**sheet["inside"]), "outside": Link(**sheet["outside"])})


def here(path: Path, how: str = "--device") -> Device:
    """Return this machine from its sheet. RecipeError if there is none that can be read."""
    where, remedy = f"{how} {HERE}: {path}", "run `triaxis doctor --measure`"
    try:
        content = read_json(path, RECIPE_BYTES)
        if content["version"] != HERE_VERSION:
            raise RecipeError(f"{where} has version {content['version']} of the sheet, not {HERE_VERSION}: {remedy}")
        return measured_device(content)
    except FileNotFoundError:
        raise RecipeError(f"{where} is not there, because this machine was not measured: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RecipeError(f"{where} cannot be read as a sheet ({type(error).__name__}: {error}): {remedy}") from error


def measured_here(environment: Mapping[str, str]) -> Device | None:
    """Return this machine if it was measured; None if not, by an earlier version, or where the
    sheet of a shared home folder is another machine's."""
    try:
        content = read_json(here_sheet(environment), RECIPE_BYTES)
        if content["version"] != HERE_VERSION or content["measured"]["machine"]["host"] != platform.node():
            return None
        return replace(measured_device(content), calibration=factor_of(HERE, environment))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def measured_device(content: Mapping[str, Any]) -> Device:
    """Return the device of a measured sheet's content."""
    sheet = {key: value for key, value in content[HERE].items() if key != "sources"}
    alone, pair = (content["measured"][name] for name in ("alone", "pair"))
    times: dict[str, dict[tuple[float, ...], float]] = {}
    for one in pair["collectives"] if pair else ():
        times.setdefault(one["kind"], {})[one["bytes"],] = one["seconds"]
    link = Link(**sheet["inside"], measured={kind: Table.of(found) for kind, found in times.items()})
    on_cores = [] if sheet["asynchronous"] else [alone, *([pair] if pair else [])]
    return Device(name=HERE, **{**sheet, "inside": link, "outside": link}, speeds=tuple(map(Speeds.of, on_cores)))


def device_named_by_driver(card: str, memory: int) -> Device | None:
    """Return the device of a card with so many bytes, by the driver's name, such as "NVIDIA
    A100-SXM4-80GB"; None where no sheet is of this card."""
    words = set(re.split(r"[\s-]+", card.upper()))
    if words & VARIANTS:
        return None
    known = (device(name) for word, names in CARDS.items() if word in words for name in names)
    return next((one for one in known if abs(memory - one.memory) < NEARLY * one.memory), None)
