"""The devices that the ranks of a run compute on: their memory, and the figures that a plan
reads."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress

import torch

from parallel.topology import Layout
from trainer.errors import UserError
from trainer.launch.ranks import Place
from trainer.planner.devices import Device, device_named_by_driver
from trainer.planner.verdict import this_machine
from trainer.run.memory_check import Machine, host_bytes


def machine_of(place: Place, layout: Layout) -> Machine:
    """Return the memory that this rank may use."""
    gpu_bytes = _gpu_bytes(place) if place.device.type == "cuda" else None
    first = place.rank - place.local_rank
    places = [layout.coord(rank).pp for rank in range(first, first + place.local_world_size)]
    return Machine(host_bytes(), place.local_world_size, gpu_bytes, places)


def sheet_of(place: Place) -> Device | None:
    """Return the figures of this rank's device: those of a known card, or of a CPU that was
    measured; None where there are none, or none that can be read: no run ends for them."""
    with suppress(UserError):
        if place.device.type == "cuda":
            return device_named_by_driver(torch.cuda.get_device_name(place.device), _gpu_bytes(place))
        return this_machine({**os.environ, "DS_ACCELERATOR": "cpu"})
    return None


def devices_of(place: Place) -> str:
    """Return the words for the devices of all ranks."""
    if place.device.type == "cuda":
        return f"{place.world_size} × {torch.cuda.get_device_name(place.device)}"
    threads = torch.get_num_threads()
    return (
        f"{place.world_size} CPU process{'es' if place.world_size > 1 else ''}, "
        f"{threads} thread{'s' if threads > 1 else ''} each"
    )


def _gpu_bytes(place: Place) -> int:
    return torch.cuda.get_device_properties(place.device).total_memory


def footprint(device: torch.device) -> int:
    """Return the most bytes that this rank has taken so far: of its GPU, with what is there beside
    torch's tensors, or of the host."""
    if device.type != "cuda":
        return resident_bytes()
    free, whole = torch.cuda.mem_get_info(device)
    beside = whole - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) + beside


def resident_bytes() -> int:
    """Return the most memory that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
