"""A layout with its plan. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planner.items import Place
from trainer.planner.prediction import Prediction
from trainer.planner.search.choice import Choice
from trainer.planner.step_time import StepTime


@dataclass(frozen=True)
class Planned:
    """A layout with its plan."""

    choice: Choice
    prediction: Prediction

    @property
    def time(self) -> StepTime:
        assert self.prediction.time is not None, "layouts are searched for a device"
        return self.prediction.time

    @property
    def seconds(self) -> float:
        return self.time.total

    @property
    def num_bytes(self) -> int:
        """The bytes that the fullest rank needs of its device."""
        return self.prediction.device_bytes

    @property
    def host_bytes(self) -> int:
        """The bytes that a rank needs of its host, at most."""
        return max(rank.peak(Place.HOST) for rank in self.prediction.ranks)

    @property
    def tokens_per_s(self) -> float:
        return self.prediction.batch.tokens_per_step / self.seconds

    @property
    def order(self) -> tuple[bool, float, int]:
        """The key of the ranking: whether it surely fits, then time, then memory."""
        return self.prediction.fits is not True, self.seconds, self.num_bytes
