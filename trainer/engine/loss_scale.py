"""The loss scale of fp16, owned here for all ZeRO stages.

DeepSpeed 0.19 updates its own dynamic scale before it divides the gradients by it, so every step at
which the scale grows has half its update. Handing over our scale each step avoids that, and gives
one behaviour at every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.schema import Precision


@dataclass
class LossScaler:
    """The factor of the loss, adapted by `update` after each step (Micikevicius et al. 2018,
    arXiv:1710.03740).

    Dynamic: an overflow beyond the tolerated `hysteresis - 1` halves the scale, not below
    `minimum`; `window` steps in a row without overflow double it and restore the tolerance. Static
    (`window` = 0): the scale never changes.
    """

    scale: float
    window: int = 0
    hysteresis: int = 1
    minimum: float = 1.0
    good_steps: int = 0
    overflows_left: int = 1

    def __post_init__(self) -> None:
        self.overflows_left = self.hysteresis

    @classmethod
    def from_recipe(cls, precision: Precision) -> LossScaler:
        """Return the scaler of a recipe: a constant 1 unless the format is fp16."""
        if precision.settled != "fp16":
            return cls(scale=1.0)
        keys = precision.loss_scale
        if keys.static is not None:
            return cls(scale=keys.static)
        return cls(2.0**keys.initial_power, keys.window, keys.hysteresis, keys.minimum)

    def state(self) -> dict[str, float]:
        """Return the values that change, for a checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows_left": self.overflows_left}

    def restore(self, state: Mapping[str, float]) -> None:
        """Set the values that were saved. A static scale, or the 1 of the other formats, stays."""
        if self.window:
            self.scale = state["scale"]
            self.good_steps, self.overflows_left = int(state["good_steps"]), int(state["overflows_left"])

    def update(self, *, overflow: bool) -> None:
        if not self.window:
            return
        if overflow:
            self.good_steps = 0
            self.overflows_left = max(0, self.overflows_left - 1)
            if self.overflows_left == 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.scale *= 2
            self.good_steps = 0
            self.overflows_left = self.hysteresis
