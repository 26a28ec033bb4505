"""The explanation of a plan: what a step computes and moves, how much of the peak that is, how long
a training of so many tokens takes, and how often to save. No torch.

| figure | formula | source |
|---|---|---|
| model FLOPs | 6 for each weight and token, and attention | Kaplan et al. 2020, arXiv:2001.08361 |
| MFU | model FLOPs / (seconds · devices · peak) | Chowdhery et al. 2022, arXiv:2204.02311, app. B |
| interval M ≫ δ | √(2 δ M) | Young 1974, doi:10.1145/361147.361115 |
| interval | √(2 δ M) (1 + √(δ / 2 M) / 3 + δ / 18 M) − δ | Daly 2006, doi:10.1016/j.future.2004.11.016 |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from trainer.costs.flops import row_flops
from trainer.model.config import TransformerConfig
from trainer.planner.memory import checkpoint_bytes, stages_of_ranks
from trainer.planner.prediction import Prediction, time_band, with_format_of
from trainer.planner.traffic import Traffic, Transfer
from trainer.planner.weights import RankWeights
from trainer.schema import Recipe

DAY_S, HOUR_S, MINUTE_S = 86400, 3600, 60


@dataclass(frozen=True, kw_only=True)
class Failures:
    """The rate at which a device fails, and that at which a checkpoint is written.

    `mtbf_hours`: mean time between failures of one device. `disk_rate`: [bytes/s].
    """

    mtbf_hours: float
    disk_rate: float


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The rhythm of checkpoints: the time that one takes, the mean time between failures of all
    devices together, and the best time from one checkpoint to the next [s]."""

    checkpoint_s: float
    mtbf_s: float
    interval_s: float
    every_steps: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training on so many tokens."""

    tokens: int
    steps: int
    days: float
    device_hours: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The figures of a plan. `flops`: of the model in a step; `band`: how far the time may be off,
    as a share. Without a device there are no transfers and no times."""

    tokens_per_step: int
    flops: int
    transfers: tuple[Transfer, ...] = ()
    step_s: float | None = None
    bubble: float | None = None
    mfu: float | None = None
    band: float | None = None
    training: Training | None = None
    saving: Saving | None = None

    def lines(self) -> Iterator[str]:
        yield f"tokens: {self.tokens_per_step:,} in a step; model FLOPs: {self.flops:.3g}"
        if self.mfu is not None and self.band is not None:
            low, high = self.mfu * (1 - self.band), self.mfu * (1 + self.band)
            yield self.time
            yield f"MFU: between {low:.0%} and {high:.0%}; bubble: {self.bubble:.1%} of the step"
        yield from self._traffic()
        if self.training is not None:
            one = self.training
            spent = f"{_duration(one.days * DAY_S)}, {one.device_hours:,.0f} device-hours"
            yield f"{one.tokens:,} tokens: {one.steps:,} steps, {spent}"
        if self.saving is not None:
            yield _saving_line(self.saving)

    @property
    def time(self) -> str:
        """The line of a step's time, which is known."""
        assert self.step_s is not None
        rate = f"{self.tokens_per_step / self.step_s:,.0f} tokens in a second"
        return f"time: {seconds(self.step_s)} for a step ± {self.band:.0%}; {rate}; MFU {self.mfu:.0%}"

    def _traffic(self) -> Iterator[str]:
        by_medium = sorted(self.transfers, key=lambda one: one.medium.value)
        for medium, group in groupby(by_medium, key=lambda one: one.medium):
            of_it = list(group)
            parts = ", ".join(f"{one.what} {one.num_bytes / 1e9:,.2f}" for one in of_it)
            total = sum(one.num_bytes for one in of_it) / 1e9
            yield f"moved {medium.value}: {total:,.2f} GB by a rank in a step ({parts})"

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["transfers"] = [
            {"what": one.what, "medium": one.medium.value, "bytes": round(one.num_bytes)} for one in self.transfers
        ]
        return found


def explain(
    recipe: Recipe,
    network: TransformerConfig,
    prediction: Prediction,
    *,
    tokens: int | None = None,
    failures: Failures | None = None,
) -> Explanation:
    """Return the figures of a plan. `tokens`: of the whole training; None for train.steps'."""
    batch, on, time = prediction.batch, prediction.device, prediction.time
    recipe = with_format_of(recipe, on)
    flops = step_flops(recipe, network, batch.global_sequences)
    if on is None or time is None:
        return Explanation(tokens_per_step=batch.tokens_per_step, flops=flops)
    steps = recipe.train.steps if tokens is None else math.ceil(tokens / batch.tokens_per_step)
    devices = prediction.layout.world_size
    traffic = Traffic(recipe=recipe, batch=batch, network=network, layout=prediction.layout, per_node=on.per_node)
    return Explanation(
        tokens_per_step=batch.tokens_per_step,
        flops=flops,
        transfers=tuple(traffic.transfers()),
        step_s=time.total,
        bubble=time.bubble / time.total,
        mfu=flops / (time.total * devices * on.peaks[recipe.precision.settled]),
        band=time_band(on),
        training=None if steps is None else _training(steps, batch.tokens_per_step, time.total, devices),
        saving=None if failures is None else saving(checkpoint_bytes(recipe, network), failures, devices, time.total),
    )


def step_flops(recipe: Recipe, network: TransformerConfig, sequences: int) -> int:
    """Return the FLOPs of a step's forward and backward, where every row is full."""
    row = [recipe.data.seq_len] * (recipe.data.row_tokens // recipe.data.seq_len)
    beside = None
    if recipe.tuning.method is not None:
        weights = RankWeights(network=network, tensor=1, tuning=recipe.tuning)
        of_stages = (weights.of_stages(stages) for stages in stages_of_ranks(recipe, network))
        beside = sum(weight.elements for found in of_stages for weight in found if weight.trained)
    return sequences * row_flops(network, [row], trained_beside=beside)


def saving(num_bytes: int, failures: Failures, devices: int, step_s: float) -> Saving:
    """Return how often to save a checkpoint of so many bytes."""
    checkpoint_s, mtbf_s = num_bytes / failures.disk_rate, failures.mtbf_hours * HOUR_S / devices
    interval = best_interval(checkpoint_s, mtbf_s)
    return Saving(
        checkpoint_s=checkpoint_s,
        mtbf_s=mtbf_s,
        interval_s=interval,
        every_steps=max(1, round(interval / step_s)),
    )


def best_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Return the time of work between two checkpoints with which the least is lost (Daly 2006,
    equation 37)."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    share = math.sqrt(checkpoint_s / (2 * mtbf_s))
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + share / 3 + share**2 / 9) - checkpoint_s


def _training(steps: int, tokens_per_step: int, step_s: float, devices: int) -> Training:
    whole = steps * step_s
    return Training(
        tokens=steps * tokens_per_step,
        steps=steps,
        days=whole / DAY_S,
        device_hours=whole * devices / HOUR_S,
    )


def _saving_line(one: Saving) -> str:
    return (
        f"save every {one.every_steps:,} steps ({_duration(one.interval_s)}): a checkpoint takes "
        f"{_duration(one.checkpoint_s)}, and one of the devices fails every {_duration(one.mtbf_s)}"
    )


def seconds(value: float) -> str:
    """Return a duration with three digits."""
    return f"{value:,.3g} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


def _duration(value: float) -> str:
    for unit, size in (("days", DAY_S), ("hours", HOUR_S), ("minutes", MINUTE_S)):
        if value >= 2 * size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.1f} s"
