"""The account of a run's time."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.checkpoint.resume import Found
from trainer.engine.engine import Engine
from trainer.run_folder import RunFolder
from trainer.track import read_metrics
from trainer.track.goodput import Ledger
from trainer.watchdog.watchdog import Watchdog


@dataclass
class Account:
    """The account of the run's time, on the first rank; it does nothing on the others."""

    ledger: Ledger | None
    engine: Engine
    watchdog: Watchdog

    def write(self, step: int, *, always: bool = False) -> None:
        if self.ledger is not None:
            self.ledger.write(step, self.engine.watch.totals(), self.watchdog.waiting(), always=always)

    def end(self, step: int) -> None:
        if self.ledger is not None:
            self.ledger.end(step, self.engine.watch.totals(), self.watchdog.waiting())

    def goodput(self, step: int) -> dict[str, float]:
        """Return {"goodput": the share of the run's time in which it trained}; {} off the first
        rank."""
        if self.ledger is None:
            return {}
        shares = self.ledger.shares(step, self.engine.watch.totals(), self.watchdog.waiting())
        return {name: share for name, share in shares.items() if name == "goodput"}


def open_ledger(folder: RunFolder, found: Found | None) -> Ledger:
    from_step = found.manifest.step if found else 0
    return Ledger(folder.path, from_step=from_step, times=times_of_steps(folder))


def times_of_steps(folder: RunFolder) -> dict[int, float]:
    """Return the time at which each step was logged."""
    return {int(record["step"] or 0): float(record["time"] or 0.0) for record in read_metrics(folder.metrics)}
