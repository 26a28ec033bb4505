"""The verdict on a plan: whether it fits, on which device, and what would make it fit. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device, device, device_named_by_driver, measured_here
from trainer.planner.items import GIB, Place
from trainer.planner.prediction import MEMORY_BAND, Prediction
from trainer.planner.search.remedies import remedies
from trainer.recipe import ResolvedRecipe

NAMED = 3  # the largest items that a verdict names
DRIVER_ANSWERS_S = 10
ASK_THE_DRIVER = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


def chosen_device(named: str | None, of_site: str | None = None, *, looks_here: bool = True) -> Device | None:
    """Return the device that is planned for: that of --device, else the site's, else this machine's
    where it may be meant; None where nobody knows it.

    RecipeError if a name has no sheet.
    """
    if named is not None:
        return device(named)
    if of_site is not None:
        return device(of_site, "the site's device")
    return this_machine(os.environ) if looks_here else None


def this_machine(environment: Mapping[str, str]) -> Device | None:
    """Return the device of this machine: its GPU, or what `doctor --measure` has found on this very
    machine; None where neither is known."""
    return _gpu(environment) or measured_here(environment)


def verdict(prediction: Prediction) -> str:
    """Return the line that says whether the fullest rank fits, with the items that would free most
    where it does not; "" for an unknown device."""
    on = prediction.device
    if on is None:
        return ""
    fullest, room = prediction.fullest, prediction.room or on.memory
    shared = " for each rank" if room < on.memory else ""
    where = (
        f"{fullest.num_bytes / GIB:,.2f} GiB on the fullest rank of the pipeline, {fullest.rank}; "
        f"{on.name} has {room / GIB:,.0f} GiB{shared}"
    )
    if prediction.fits:
        return f"fits: {where}"
    if prediction.fits is None:
        return f"too close to tell: {where}, and the plan errs by {MEMORY_BAND:.0%}"
    counted = (item for item in fullest.items if item.place is Place.DEVICE or (not on.is_gpu and item.place is Place.HOST))
    items = sorted(counted, key=lambda item: -item.num_bytes)[:NAMED]
    return f"does not fit: {where}; most of it: " + ", ".join(f"{item.name} {item.num_bytes / GIB:,.2f} GiB" for item in items)


def require_fit(resolved: ResolvedRecipe, network: TransformerConfig, prediction: Prediction) -> None:
    """Raise RecipeError where the plan is beyond its device by more than it errs: the verdict, and
    what would make it fit."""
    if prediction.fits is False:
        raise RecipeError([verdict(prediction), *ways_to_fit(resolved, network, prediction)])


def ways_to_fit(resolved: ResolvedRecipe, network: TransformerConfig, prediction: Prediction) -> list[str]:
    """Return a line for each of the cheapest changes with which a plan fits that does not."""
    return [f"would fit: {remedy.line}" for remedy in remedies(resolved, network, prediction)]


def _gpu(environment: Mapping[str, str]) -> Device | None:
    if environment.get("DS_ACCELERATOR", "cuda") != "cuda":
        return None
    try:
        said = subprocess.run(ASK_THE_DRIVER, capture_output=True, text=True, timeout=DRIVER_ANSWERS_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for line in said.splitlines():
        card, _, mib = line.rpartition(",")
        if mib.strip().isdecimal():
            return device_named_by_driver(card.strip(), int(mib) << 20)
    return None
