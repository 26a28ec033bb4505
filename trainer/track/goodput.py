"""An account of where the time given to a run has gone, over all its starts: `goodput.json` in the
run folder.

    goodput = (data + compute + communication − lost) / allocated

`allocated` is the sum over the starts of the time from the start of the first rank's process to its
last record. `lost` is the time of steps after the checkpoint that the next start resumed from:
those steps were trained twice. `init` is everything before the first step, imports included.
Communication is compute during which the first rank was seen waiting in a collective, by samples
ten times a second; on GPUs the host runs ahead of the device, so there it counts as compute. No
torch.
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
WRITTEN_EVERY_S = 30.0  # a kill leaves at most this much of the last start unrecorded
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
    """A start of a run, with its seconds by kind."""

    began: Seconds
    until: Seconds
    from_step: int
    to_step: int
    seconds: dict[str, Seconds]
    lost_s: Seconds


class _Starts(TypedDict):
    starts: list[Start]


class Ledger:
    """The account of this start, on the first rank; those of earlier starts are kept."""

    def __init__(self, folder: Path, *, from_step: int, times: Mapping[int, float]) -> None:
        """Read the earlier starts and close the last one.

        `times`: when each step was logged before. What came after `from_step` will be trained
        again.
        """
        self._path = folder / LEDGER
        self._spare = Spare(self._path, "what is not written is missing from the account of the run's time")
        self._starts = read_starts(folder)
        if self._starts:
            _close(self._starts[-1], from_step, times)
        self._began = time.time() - age_of_this_process()
        self._from_step = from_step
        self._lost_s = 0.0
        self._written = -math.inf
        self._ended = False

    def write(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float], *, always: bool = False) -> None:
        """Write the account, at most every 30 s unless `always`.

        `totals`: seconds by phase since the stopwatch began. `waiting`: for each phase the share
        spent waiting for other ranks.
        """
        if always or time.monotonic() - self._written >= WRITTEN_EVERY_S:
            self._written = time.monotonic()
            with self._spare.written():
                write_json(self._path, {"starts": [*self._starts, self.of_now(step, totals, waiting)]})

    def end(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> None:
        """Write the final account of this start. Only the first call counts, so that a report made
        from it stays true."""
        if not self._ended:
            self._ended = True
            self.write(step, totals, waiting, always=True)

    def of_now(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> Start:
        now, seconds = time.time(), dict.fromkeys(KINDS[:-1], 0.0)
        # Imports came before the stopwatch began.
        seconds["init"] = max(0.0, now - self._began - sum(totals.values()))
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
        """Count seconds of training that were undone."""
        self._lost_s += seconds

    def shares(self, step: int, totals: Mapping[str, float], waiting: Mapping[str, float]) -> dict[str, float]:
        return shares_of([*self._starts, self.of_now(step, totals, waiting)])


def shares_of(starts: Sequence[Start]) -> dict[str, float]:
    """Return {"allocated_s", "goodput", "explained"} and the share of each kind. `lost` is taken
    out of the training it was part of."""
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
    """Return the starts of a run; [] if there is no readable ledger, because it is a report and not
    state."""
    try:
        return read_as(_Starts, folder / LEDGER)["starts"]
    except (OSError, ValueError):
        return []


def lost_s(times: Mapping[int, float], from_step: int) -> float:
    """Return the seconds from the checkpoint's step to the last one, by the times at which steps
    were recorded."""
    later = [at for step, at in times.items() if step > from_step]
    before = [at for step, at in times.items() if step <= from_step]
    return max(later) - max(before) if later and before else 0.0


def age_of_this_process() -> float:
    """Return the seconds since this process was started."""
    started_s = start_of(os.getpid()) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started_s


def _close(start: Start, from_step: int, times: Mapping[int, float]) -> None:
    """Complete a start that a kill kept from its last record: the time up to its last logged step
    was training."""
    untold = max(0.0, max(times.values(), default=0.0) - start["until"])
    start["until"] += untold
    start["seconds"]["compute"] += untold
    trained = sum(start["seconds"][kind] for kind in TRAINING)
    start["lost_s"] = min(start["lost_s"] + lost_s(times, from_step), trained)
