"""The guard of a run while it trains: skipped steps, spikes, and replicas that have drifted apart.

It decides everything from numbers that all ranks have alike, so they decide alike. What it
remembers goes into checkpoints, so that a resumed run decides as the undisturbed one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.topology import Layout
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.data.loader import MicroBatch
from trainer.engine.loss_scale import LossScaler
from trainer.engine.step_result import StepResult
from trainer.errors import EXIT_NO_PROGRESS, DataError, NotFinite, UserError
from trainer.files.durable import make_private, write_json
from trainer.guard.culprit import Culprit
from trainer.guard.inspector import Inspector
from trainer.guard.spike_window import SpikeWindow
from trainer.launch.ranks import PeerFailed
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe

REWINDS = 3  # in a row to one checkpoint: after it, steps spike whatever the data
REPLAY_FILES = 20  # a few hundred bytes each; the newest tell as much as all


class NoProgress(UserError):
    """The end of a run in which every step is skipped."""

    exit_code = EXIT_NO_PROGRESS


class Guard:
    """A judge of each step, which ends a run that cannot go on.

    Every rank calls `judge` together, with the same result.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: BatchPlan,
        layout: Layout,
        inspector: Inspector,
        *,
        scaler: LossScaler,
        checkpoints: Checkpoints,
        first_sequence: Callable[[int], int],
        folder: Path,
        is_first: bool,
        note: Callable[[str], None],
    ) -> None:
        """Take what a run has.

        `first_sequence` gives the global number of the first sequence of a step. The first rank
        writes records of skipped steps into `folder`. `note` shows a line.
        """
        self._recipe, self._keys, self._plan, self._layout = recipe, recipe.guard, plan, layout
        self._inspector, self._scaler, self._checkpoints = inspector, scaler, checkpoints
        self._first_sequence, self._folder, self._is_first, self._note = first_sequence, folder, is_first, note
        memory = checkpoints.memory.get("guard", {})
        self._in_a_row: int = memory.get("skipped_in_a_row", 0)
        self._not_finite_since: int | None = memory.get("not_finite_since")
        self._unread: list[tuple[int, StepResult]] = []
        self.must_rewind = False  # the last step's spike is to be undone
        self._agreed: int = checkpoints.start_step  # all replicas were equal after this step
        self._windows = {
            name: SpikeWindow(self._keys.spike_window, self._keys.spike_threshold, memory.get(name, ()))
            for name in (("loss", "grad_norm") if self._keys.on_spike != "off" else ())
        }

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge as this one would."""
        since = {} if self.not_finite_since is None else {"not_finite_since": self.not_finite_since}
        return {"skipped_in_a_row": self._in_a_row, **since, **{name: window.values for name, window in self._windows.items()}}

    @property
    def norm_limit(self) -> float:
        """The largest gradient norm that the next step may apply."""
        return self._windows["grad_norm"].limit if self._keys.on_spike == "skip" else math.inf

    def judge(self, step: int, lr: float, result: StepResult, micro_batches: Sequence[MicroBatch]) -> None:
        """Judge step `step`, counted from 0; NoProgress or DataError if the run must end."""
        self._unread.append((step, result))
        if result.skipped or result.is_read:
            self._look_at_losses()
        if result.skipped:
            self._explain(step, result, micro_batches)
        self._look_for_spikes(step, result)
        self._count(result)
        if self._keys.check_every and (step + 1) % self._keys.check_every == 0:
            self._compare(step, lr)

    def require_finite(self, steps: int) -> None:
        """Raise NotFinite after the last of `steps` steps if the model gives no finite loss.

        A last step that was skipped may have had another cause, so its loss is computed once more.
        """
        if self.not_finite_since is None:
            return
        if not math.isfinite(self._inspector.loss(steps - 1)):
            self._end(NotFinite("the loss", step=steps, began=self.not_finite_since))

    @property
    def not_finite_since(self) -> int | None:
        """The first step since when no loss was finite; None if the last one was."""
        self._look_at_losses()
        return self._not_finite_since

    def _look_at_losses(self) -> None:
        """Read the losses of the steps that were only computed. The first to be asked for brings
        those of all from the device."""
        for step, result in self._unread:
            if math.isfinite(result.loss):
                self._not_finite_since = None
            elif self._not_finite_since is None:
                self._not_finite_since = step + 1
        self._unread.clear()

    def _explain(self, step: int, result: StepResult, micro_batches: Sequence[MicroBatch]) -> None:
        """Show one line that names the culprit, and write a file with what a replay needs."""
        if math.isfinite(result.grad_norm):
            self._record(step, result, None, reason := f"the gradient norm {result.grad_norm:.4g} is a spike")
            self._note(f"step {step + 1} skipped: {reason}")
            return
        culprit = self._inspector.culprit(
            micro_batches, step=step, scale=result.loss_scale, loss_is_finite=math.isfinite(result.loss)
        )
        reason = self._told(step, culprit)
        self._record(step, result, culprit, reason)
        self._note(
            f"step {step + 1} skipped: the gradient is not finite (loss {result.loss:.4g}, loss scale {result.loss_scale:g}): "
            f"{reason}"
        )

    def _told(self, step: int, culprit: Culprit | None) -> str:
        if culprit is None:
            return (
                "a replay finds each value finite: their sum over micro-batches or their norm overflows, or a memory or "
                "device was wrong for a moment"
            )
        where = f"{culprit.what}, first on rank{'s' if len(culprit.ranks) > 1 else ''} {', '.join(map(str, culprit.ranks))}"
        sequences = self._sequences(step, culprit)
        return f"{where}, sequences {', '.join(map(str, sequences))}" if sequences else where

    def _sequences(self, step: int, culprit: Culprit) -> list[int]:
        """Return the global numbers of the sequences in the culprit's micro-batch, on each of its
        data-parallel ranks; [] if the micro-batch is not known."""
        plan, layout = self._plan, self._layout
        if culprit.micro_batch is None:
            return []
        places = {layout.peers(rank, "dp").index(rank) for rank in culprit.ranks}
        first = self._first_sequence(step)
        firsts = [
            first + place * plan.sequences_per_rank + culprit.micro_batch * plan.micro_sequences for place in sorted(places)
        ]
        return [first + n for first in firsts for n in range(plan.micro_sequences)]

    def _record(self, step: int, result: StepResult, culprit: Culprit | None, reason: str) -> None:
        if not self._is_first:
            return
        plan, recipe = self._plan, self._recipe
        first = self._first_sequence(step)
        record = {
            "step": step + 1,
            "reason": reason,
            "what": culprit and culprit.what,
            "ranks": culprit and list(culprit.ranks),
            "sequences": self._sequences(step, culprit) if culprit else [],
            # [first, end) of each data-parallel rank
            "sequences_of_ranks": [
                [first + n * plan.sequences_per_rank, first + (n + 1) * plan.sequences_per_rank] for n in range(plan.dp)
            ],
            "loss": repr(result.loss),
            "grad_norm": repr(result.grad_norm),
            "loss_scale": result.loss_scale,
            "dtype": recipe.precision.settled,
            "seed": recipe.run.seed,
            "layout": {"pipeline": recipe.parallel.pipeline, "tensor": recipe.parallel.tensor, "zero": recipe.zero.stage},
        }
        folder = self._folder
        try:
            write_json(make_private(folder) / f"step-{step + 1:08d}.json", record)
            for old in sorted(folder.glob("step-*.json"))[:-REPLAY_FILES]:
                old.unlink()
        except OSError as error:
            self._note(f"warning: {folder}: {error.strerror}: no record of step {step + 1}; training goes on")

    def _look_for_spikes(self, step: int, result: StepResult) -> None:
        for name, window in self._windows.items():
            value, limit = getattr(result, name), window.limit
            if math.isfinite(value) and value > limit and not (result.skipped and name == "grad_norm"):
                self._note(
                    f"step {step + 1}: spike: {name} {value:.4g} is above {limit:.4g}, {self._keys.spike_threshold:g} robust "
                    f"deviations over the median of the last {self._keys.spike_window} steps"
                )
                self.must_rewind |= self._may_rewind()
            window.add(value)

    def _may_rewind(self) -> bool:
        if self._keys.on_spike != "rewind":
            return False
        saved, rewinds = self._checkpoints.saved_step, self._checkpoints.rewinds
        if saved is None:
            self._note("there is no checkpoint to go back to yet: training goes on")
        elif rewinds >= REWINDS and saved == self._checkpoints.start_step:
            self._end(
                NoProgress(
                    f"{rewinds} times in a row the loss or gradient norm spiked after step {saved}, each time on other data: "
                    "lower optimizer.lr, or go on from an earlier checkpoint (--resume PATH)"
                )
            )
        return saved is not None

    def _count(self, result: StepResult) -> None:
        scaler = self._scaler
        # A dynamic scale still has somewhere to go above its minimum: those skips are its search.
        searching = scaler.window > 0 and result.loss_scale > scaler.minimum
        self._in_a_row = self._in_a_row + (not searching) if result.skipped else 0
        if self._keys.max_skipped and self._in_a_row >= self._keys.max_skipped:
            self._end(
                NoProgress(
                    f"{self._in_a_row} steps in a row were skipped (guard.max_skipped): {self._advice()}; "
                    f"{self._folder} has what each of the last ones failed on"
                )
            )

    def _advice(self) -> str:
        scaler, precision = self._scaler, self._recipe.precision
        if precision.dtype != "fp16":
            return "lower optimizer.lr, lengthen schedule.warmup_steps, or go on from an earlier checkpoint (--resume PATH)"
        if scaler.window:
            return (
                f"gradients overflow fp16 even at the smallest loss scale {scaler.minimum:g}: set precision.dtype to bf16, or "
                "lower optimizer.lr, or go on from an earlier checkpoint (--resume PATH)"
            )
        return (
            f"precision.loss_scale.static {scaler.scale:g} may be too large: leave it out for a dynamic one, or set "
            "precision.dtype to bf16"
        )

    def _compare(self, step: int, lr: float) -> None:
        wrong = self._inspector.disagreements(step, lr)
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            self._end(
                DataError(
                    f"after step {step + 1}: {wrong[0]}{more}; last compared equal after step {self._agreed}: a memory or "
                    "device is faulty; check it, and go on from a checkpoint up to that step (--resume PATH)"
                )
            )
        self._agreed = step + 1

    def _end(self, error: UserError) -> None:
        """Raise the error on the first rank and PeerFailed on the others, once what is being saved
        is on disk."""
        for line in self._checkpoints.wait():
            self._note(line)
        raise error if self._is_first else PeerFailed(error.exit_code)
