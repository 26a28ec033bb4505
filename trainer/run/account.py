"""The account of a run's time."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.engine.engine import Engine
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
