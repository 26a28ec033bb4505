"""The factor of a kind of device: the time that a run's steps took over the time planned for them.
No torch.

It is the last step from a data sheet to a machine, with its clocks, its drivers and its network.
Every plan of this user for such a device is multiplied by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer.errors import DataError, RecipeError
from trainer.files.decoding import OPEN, read_as
from trainer.files.durable import make_private, write_json
from trainer.files.paths import calibration_file
from trainer.files.reading import told
from trainer.track.jsonl import read_summary
from trainer.track.text import duration

Factor = Annotated[float, Field(gt=0.0, lt=1e9)]


@with_config(OPEN)
class Calibrated(TypedDict):
    """The factor of a kind of device, and the run that it was taken from."""

    factor: Factor
    run: str


def factor_of(name: str, environment: Mapping[str, str]) -> float:
    """Return the factor of a kind of device; 1 where no run has given one."""
    found = _read(calibration_file(environment)).get(name)
    return found["factor"] if found else 1.0


def said_of(name: str, environment: Mapping[str, str]) -> str:
    """Return the line that says by what a plan for this kind of device is multiplied; "" where it
    is not."""
    found = _read(calibration_file(environment)).get(name)
    return f"calibrated: times of {name} are multiplied by {found['factor']:.3g}, from {found['run']}" if found else ""


def calibrate(run: Path, environment: Mapping[str, str]) -> str:
    """Keep the factor that a finished run gives, and return the line that says by how much it has
    moved. RecipeError where the run gives none."""
    if not run.is_dir():
        raise RecipeError(f"--calibrate {run}: no such folder: give the folder of a run (run.dir/run.name)")
    record = read_summary(run).get("plan")
    device = record["device"] if record else None
    planned, measured = (record[part]["step_time_s"] if record else None for part in ("predicted", "measured"))
    if record is None or device is None or planned is None or measured is None:
        raise RecipeError(
            f"--calibrate {run}: its summary.json has no planned and measured time of a step: give a run that has ended, on a "
            "device with a sheet (a CPU has one after triaxis doctor --measure)"
        )
    path = calibration_file(environment)
    kept, factor = _read(path), record["calibration"] * measured / planned
    before = kept[device]["factor"] if device in kept else 1.0
    _write(path, {**kept, device: Calibrated(factor=factor, run=str(run.absolute()))})
    return (
        f"{device}: steps of {run} took {duration(measured)}, planned {duration(planned)}; plans are now multiplied by "
        f"{factor:.3g}, before by {before:.3g} ({factor / before - 1:+.1%}): {path}"
    )


def _read(path: Path) -> dict[str, Calibrated]:
    try:
        return read_as(dict[str, Calibrated], path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({told(error)}): remove it") from error


def _write(path: Path, kept: Mapping[str, Calibrated]) -> None:
    try:
        make_private(path.parent)
        write_json(path, dict(kept))
    except OSError as error:
        raise RecipeError(f"{path}: {told(error)}: set XDG_CONFIG_HOME to a folder that can be written") from error
