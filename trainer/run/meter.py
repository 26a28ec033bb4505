"""Training records from the results of steps: rates, the division of time, MFU, memory, skipped
steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from trainer.costs.flops import row_flops
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.engine.parameter_counts import ParameterCounts
from trainer.engine.step_result import StepResult
from trainer.run.devices import resident_bytes
from trainer.track import Tracker, read_metrics
from trainer.track.history import History

PARTS = ("data", "forward", "backward", "optimizer")


class Meter:
    """A meter that logs a record every `train.log_every` steps and at the last. Its times are means
    over the steps since the record before."""

    def __init__(
        self,
        engine: Engine,
        counts: ParameterCounts,
        *,
        peak_flops: float,
        tracker: Tracker,
        account: Callable[[int], None],
        metrics: Path,
        skipped: int,
    ) -> None:
        """Prepare the meter. `peak_flops`: of this rank's device, FLOP/s. `account` is called with
        the number of steps done after each record. `metrics`: the file of the tracker's records.
        `skipped`: steps that were skipped before."""
        self._engine, self._counts, self._peak_flops = engine, counts, peak_flops
        self._tracker, self._account, self._metrics = tracker, account, metrics
        self._skipped = skipped
        self._last: dict[str, float | int] = {}
        self.restart()

    def state(self) -> dict[str, int]:
        """Return the values from which a resumed run must continue counting."""
        return {"skipped": self._skipped}

    def restart(self) -> None:
        """Begin a new interval, which leaves out the time since the last record (evaluation,
        saving)."""
        self._steps = 0
        self._flops = 0
        self._engine.watch.lap()
        self._since = time.perf_counter()

    def record(self, steps_done: int, lr: float, result: StepResult, micro_batches: Sequence[MicroBatch]) -> None:
        engine, keys = self._engine, self._engine.recipe.train
        self._steps += 1
        # The micro-batches are this rank's; the ranks that have one copy of the model together
        # share their work.
        rows = (row for batch in micro_batches for row in batch.documents.lengths)
        self._flops += row_flops(engine.network, rows, trained_beside=self._counts.trained_beside)
        self._skipped += result.skipped
        if steps_done % keys.log_every and steps_done != keys.total_steps:
            return
        spent = engine.watch.lap()
        span_s = time.perf_counter() - self._since
        step_time_s = span_s / self._steps
        split = {f"time_{part}_s": spent.get(part, 0.0) / self._steps for part in PARTS}
        self._last = {
            "step": steps_done,
            "loss": result.loss,
            **result.statistics,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "loss_scale": result.loss_scale,
            "tokens": steps_done * engine.plan.tokens_per_step,
            "tokens_per_s": engine.plan.tokens_per_step / step_time_s,
            "step_time_s": step_time_s,
            **split,
            "time_other_s": max(0.0, step_time_s - sum(split.values())),
            "mfu": self._flops / engine.mesh.replica.size / span_s / self._peak_flops,
            "memory_gib": peak_memory_gib(engine.device),
            "skipped": self._skipped,
            "num_targets": result.num_targets,
            "time": time.time(),
        }
        self._tracker.log(self._last)
        self._account(steps_done)
        self.restart()

    def summary(self) -> Mapping[str, float | int]:
        """Return the closing figures.

        They are those of the last record. Rates are medians over all records of the run, as in its
        report. Few figures are there when a resumed run had no step to do.
        """
        if not self._last:
            return self.state()
        history = History.of(read_metrics(self._metrics))
        medians = {key: history.median(key) for key in ("tokens_per_s", "mfu")}
        rates = {key: self._last[key] if median is None else median for key, median in medians.items()}
        last = {key: self._last[key] for key in ("tokens", "memory_gib", "skipped")}
        return {"final_loss": self._last["loss"], **rates, **last}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory [GiB] that this rank has used: on the GPU, or resident in the
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_bytes() / 2**30
