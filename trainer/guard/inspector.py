"""An inspector of a model that may have gone wrong.

It finds the value that was the first not to be finite, compares what ranks hold alike, and computes
a loss again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parallel.messages import Messages
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.guard.culprit import Culprit, find_culprit
from trainer.guard.replicas import disagreements, replicas


class Inspector:
    """Inspections of an engine's model, made by all ranks together."""

    def __init__(self, engine: Engine, messages: Messages, micro_batches: Callable[[int], Sequence[MicroBatch]]) -> None:
        """Take `micro_batches`, which gives this rank's part of a step."""
        self._engine, self._messages, self._micro_batches = engine, messages, micro_batches

    def culprit(self, micro_batches: Sequence[MicroBatch], *, step: int, scale: float, loss_is_finite: bool) -> Culprit | None:
        """Return the first value of a skipped step that is not finite; None if a replay finds each
        one finite."""
        with self._engine.watch("guard"):
            return find_culprit(
                self._engine, self._messages, micro_batches, step=step, scale=scale, loss_is_finite=loss_is_finite
            )

    def disagreements(self, step: int, lr: float) -> list[str]:
        """Return a line for each tensor that ranks should hold alike and do not."""
        engine = self._engine
        with engine.watch("guard"):
            held = list(replicas(engine.specs, engine.mesh, engine.zero_stage))
            return disagreements(held, self._messages, engine.device, step=step, lr=lr)

    def loss(self, step: int) -> float:
        """Return the loss on the data of a step, without learning."""
        return self._engine.evaluator.evaluate(iter(self._micro_batches(step))).loss
