"""Triaxis's side: `trainer.loop.train` itself, whose stop request, asked before each step, waits
there for its turn.

    python -m tuning.ours RECIPE READS WRITES

`READS` and `WRITES`: see `turns.Turn`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tuning.turns import Turn

from trainer.checkpoint.resume_check import Resume
from trainer.launch.stop_request import Ranks, StopRequest
from trainer.loop import train
from trainer.recipe import load
from trainer.track import read_metrics


class InTurn(StopRequest):
    """A request to stop that comes when no other step is wanted."""

    def __init__(self, turn: Turn, metrics: Path) -> None:
        super().__init__()
        self._turn, self._metrics = turn, metrics

    def agreed(self, ranks: Ranks, word: int = 0) -> str:
        records = read_metrics(self._metrics)
        numbers = {name: records[-1][name] for name in ("loss", "grad_norm")} if records else {}
        return super().agreed(ranks, word) or ("" if self._turn.wait(**numbers) else "no other step is wanted")


def main(recipe: str) -> None:
    resolved = load(recipe)
    keys = resolved.recipe.run
    turn = Turn.from_arguments()
    train(resolved, None, Resume("never"), InTurn(turn, Path(keys.dir) / str(keys.name) / "metrics.jsonl"))


if __name__ == "__main__":
    main(sys.argv[1])
