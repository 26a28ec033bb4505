"""The choice to compile the steps of a run (train.compile): made by the first start, and kept for
all later ones, because a compiled step differs from another in rounding.

Where the recipe leaves it open, a run that is long enough measures: steps are rehearsed with and
without, in turn, before the first one. All ranks take the choice of the first.

| file of the run folder | content |
|---|---|
| `compilation.json` | `Choice`: what was chosen, and why |
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from parallel.fusable import FUSING
from parallel.messages import Messages
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.model.config import TransformerConfig
from trainer.run.worst_case import worst_of

KEY = "train.compile"
# Below these a run gains less than compiling and measuring take: ten rehearsals, and a compilation
# of some 10 s.
LEAST_STEPS, LEAST_S = 200, 300.0
PAIRS = 3  # of rehearsals, with and without
LEAST_GAIN = 1.02  # less is within what two measurements of the same differ by


@dataclass(frozen=True)
class Choice:
    """The choice, and the reason as it is shown."""

    compiles: bool
    why: str

    @property
    def line(self) -> str:
        return f"{KEY}: {'on' if self.compiles else 'off'}, {self.why}"


def settle_compilation(
    engine: Engine, messages: Messages, path: Path, *, start_step: int, batches: Callable[[], Sequence[MicroBatch]]
) -> list[str]:
    """Set whether the engine compiles its steps; return remarks. `batches` gives the micro-batches
    of the next step. All ranks must call it together, before that step."""
    asked = engine.recipe.train.compile
    kept = messages.broadcast(_read(path) if messages.is_first else None)
    if asked is None and kept is not None:
        choice = Choice(kept["compiles"], "as an earlier start of this run chose")
    elif asked is None and start_step:
        choice = Choice(False, "as the run began")
    else:
        choice = _chosen(engine, messages, asked, engine.recipe.train.total_steps - start_step, batches)
    lacking = messages.largest(int(choice.compiles and compiler(engine.device) is None))
    if lacking:
        choice = Choice(False, _without_compiler(engine.device))
    engine.compiles = choice.compiles
    if messages.is_first and kept is None:
        write_json(path, asdict(choice))
    return [choice.line]


def compilation_failed(engine: Engine, messages: Messages) -> list[str]:
    """Return a remark if a compilation has failed on a rank, and compile no more on any. All ranks
    must call it together after each step."""
    if not engine.compiles or not messages.largest(int(FUSING.failure is not None)):
        return []
    engine.compiles = False
    said = [failure for failure in messages.all(FUSING.failure) if failure]
    return [f"warning: {KEY}: off from here on, the compiler failed: {said[0]}"]


def compiler(device: torch.device) -> str | None:
    """Return what torch.compile compiles with on this device; None where it is not installed."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else None
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def _chosen(
    engine: Engine, messages: Messages, asked: bool | None, steps: int, batches: Callable[[], Sequence[MicroBatch]]
) -> Choice:
    if asked is not None:
        return Choice(asked, "as the recipe says")
    if not isinstance(engine.network, TransformerConfig):
        return Choice(False, "the layers are those of transformers")
    if steps < LEAST_STEPS:
        return Choice(False, f"a run of {steps:,} steps is too short to gain by it")
    if messages.largest(int(compiler(engine.device) is None)):
        return Choice(False, _without_compiler(engine.device))
    engine.watch.begin("measuring compilation")
    try:
        return _measured(engine, messages, steps, batches())
    finally:
        engine.watch.begin("start")


def _measured(engine: Engine, messages: Messages, steps: int, batches: Sequence[MicroBatch]) -> Choice:
    chosen = worst_of(engine, batches)

    def rehearsed(compiles: bool) -> float:
        """Return the time that the slowest rank takes [s]."""
        engine.compiles = compiles
        started = time.perf_counter()
        engine.rehearse(chosen)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        engine.watch.tick()
        slowest: float = max(messages.all(time.perf_counter() - started))
        return slowest

    rehearsed(False)  # memory is allocated
    left_s = steps * rehearsed(False) * len(batches) / len(chosen)
    if left_s < LEAST_S:
        return Choice(False, f"a run of about {left_s:,.0f} s is too short to gain by it")
    took_s = rehearsed(True)
    if failed := compilation_failed(engine, messages):
        return Choice(False, failed[0].partition("here on, ")[2])
    pairs = [(rehearsed(False), rehearsed(True)) for _ in range(PAIRS)]
    gain: float = messages.broadcast(median(without / compiled for without, compiled in pairs))
    figures = f"a step is {gain:.2f} times as fast, measured in {PAIRS} pairs of rehearsals after {took_s:.0f} s of compiling"
    return Choice(gain >= LEAST_GAIN, figures)


def _without_compiler(device: torch.device) -> str:
    return f"no compiler: {'triton' if device.type == 'cuda' else 'g++ or clang++'} is not installed on every rank"


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an earlier start has chosen; None where there is nothing, or nothing sound."""
    try:
        return asdict(read_as(Choice, path))
    except (OSError, ValueError):
        return None
