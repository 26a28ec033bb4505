"""Where the time that a run was given has gone, over all its starts: `goodput.json` in the run folder.

    goodput = (data + compute + communication − lost) / allocated

`allocated` is the sum over the starts of the time from the start of the first rank's process to its last sign of life; `lost`,
what was trained after the checkpoint that the next start went on from: those steps were made twice. `init` is everything before
the first step, imports included. Communication is compute during which the first rank was seen to wait in a collective, by
samples ten times a second; on GPUs the host runs ahead of the device, so there it is part of compute. No torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.files.spare import Spare
from trainer.launch.processes import start_of

LEDGER = "goodput.json"
WRITTEN_EVERY_S = 30.0  # a kill leaves at most this much of the last start untold
KINDS = ("init", "data", "compute", "communication", "save", "evaluation", "guard", "export", "other", "lost")
TRAINING = ("data", "compute", "communication")
STARTING = ("start", "reading the data", "looking for a checkpoint", "building the model", "restoring the checkpoint")
KIND_OF = {
    **dict.fromkeys((*STARTING, "rewinding"), "init"),
    **dict.fromkeys(("forward", "backward", "optimizer"), "compute"),
    **{"data": "data", "saving": "save", "evaluation": "evaluation", "guard": "guard", "export": "export"},
}


Seconds = Annotated[float, Field(ge=0.0, le=1e12, allow_inf_nan=False)]


class Start(TypedDict):
    """One start of a run; `seconds` by what they were for."""

    began: Seconds
    until: Seconds
    from_step: int
    to_step: int
    seconds: dict[str, Seconds]
    lost_s: Seconds


class _Starts(TypedDict):
    starts: list[Start]


class Ledger:
    """Of this start, on the first rank; earlier starts are kept. `times`: when each step was logged before; what came after
    `from_step` is made again."""

    def __init__(self, folder: Path, *, from_step: int, times: Mapping[int, float]) -> None:
        self._path = folder / LEDGER
        self._spare = Spare(self._path, "what is not written there is missing in the account of the run's time")
        self._starts = read_starts(folder)
        if self._starts:
            _close(self._starts[-1], from_step, times)
        self._began = time.time() - age_of_this_process()
        self._from_step = from_step
        self._lost_s = 0.0
        self._written = -math.inf
        self._ended = False

    def write(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float], *, always: bool = False) -> None:
        """`totals`: seconds by phase since the stopwatch began; `waiting`: of each, the share that waited for other ranks."""
        if always or time.monotonic() - self._written >= WRITTEN_EVERY_S:
            self._written = time.monotonic()
            with self._spare.written():
                write_json(self._path, {"starts": [*self._starts, self.of_now(step, totals, waiting)]})

    def end(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> None:
        """The last word of this start; the first one counts, so that a report made of it stays true."""
        if not self._ended:
            self._ended = True
            self.write(step, totals, waiting, always=True)

    def of_now(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> Start:
        now, seconds = time.time(), dict.fromkeys(KINDS[:-1], 0.0)
        seconds["init"] = max(0.0, now - self._began - sum(totals.values()))  # before the stopwatch was made: imports
        for phase, spent in totals.items():
            kind = KIND_OF.get(phase, "other")
            waited = spent * waiting.get(phase, 0.0) if kind == "compute" else 0.0
            seconds["communication"] += waited
            seconds[kind] += spent - waited
        return {
            "began": self._began,
            "until": now,
            "from_step": self._from_step,
            "to_step": step,
            "seconds": seconds,
            "lost_s": self._lost_s,
        }

    def lose(self, seconds: float) -> None:
        """What was trained in them is undone."""
        self._lost_s += seconds

    def shares(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> dict[str, float]:
        return shares_of([*self._starts, self.of_now(step, totals, waiting)])


def shares_of(starts: Sequence[Start]) -> dict[str, float]:
    """{"allocated_s", "goodput", "explained", and the share of each kind}: `lost` is taken out of the training that it was."""
    allocated = sum(start["until"] - start["began"] for start in starts)
    if allocated <= 0:
        return {}
    seconds = {kind: sum(start["seconds"].get(kind, 0.0) for start in starts) for kind in KINDS}
    seconds["lost"] = sum(start["lost_s"] for start in starts)
    trained = sum(seconds[kind] for kind in TRAINING)
    kept = max(0.0, trained - seconds["lost"])
    for kind in TRAINING:
        seconds[kind] *= kept / trained if trained else 0.0
    explained = sum(spent for kind, spent in seconds.items() if kind != "other")
    return {
        "allocated_s": allocated,
        "goodput": kept / allocated,
        "explained": explained / allocated,
        **{kind: spent / allocated for kind, spent in seconds.items()},
    }


def read_starts(folder: Path) -> list[Start]:
    """The starts of a run; [] when there is no ledger, or none that can be read: it is a report, not state."""
    try:
        return read_as(_Starts, folder / LEDGER)["starts"]
    except (OSError, ValueError):
        return []


def lost_s(times: Mapping[int, float], from_step: int) -> float:
    """Of the records' times by step: from that of the checkpoint's step to the last."""
    later = [at for step, at in times.items() if step > from_step]
    before = [at for step, at in times.items() if step <= from_step]
    return max(later) - max(before) if later and before else 0.0


def age_of_this_process() -> float:
    """Seconds since it was started."""
    started_s = start_of(os.getpid()) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started_s


def _close(start: Start, from_step: int, times: Mapping[int, float]) -> None:
    """A kill keeps a start from telling its last seconds: up to the last step that it logged they were training."""
    untold = max(0.0, max(times.values(), default=0.0) - start["until"])
    start["until"] += untold
    start["seconds"]["compute"] += untold
    trained = sum(start["seconds"][kind] for kind in TRAINING)
    start["lost_s"] = min(start["lost_s"] + lost_s(times, from_step), trained)
