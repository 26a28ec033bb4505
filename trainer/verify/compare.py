"""The comparison of two layouts' results, and the verdict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file

from trainer.verify.job import GRADIENT, UPDATE, RankResult

# Sums in another order differ in float64 by some 1e-16 of their largest term; up to 3e-15 was seen.
# A mistake changes an element by a share of itself.
ROUNDING_FLOAT64 = 1e-10
# In fp32 the same is some 6e-8, which steps of Adam magnify; up to 3e-6 was seen. A larger
# difference while float64 agrees comes from what only the fp32 steps do: ZeRO, its clipping, decay.
ROUNDING_FP32 = 1e-3
# Some gradients are 0 except for rounding (a key's bias shifts all logits of a query alike), so an
# element is compared with its tensor's largest one, or with this share of the model's largest if
# that is more.
FLOOR = 1e-3


@dataclass(frozen=True)
class Outcome:
    """The files that a layout's ranks left."""

    ranks: list[RankResult]
    update: Mapping[str, np.ndarray]
    gradient: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path, world_size: int) -> Outcome:
        ranks = [RankResult.read(folder / f"rank-{rank}.json") for rank in range(world_size)]
        return cls(ranks, load_file(folder / UPDATE), load_file(folder / GRADIENT))

    @property
    def names(self) -> list[str]:
        """The names of the logical tensors, in the model's order."""
        return list(self.ranks[0].initial)

    @property
    def initial_hash(self) -> str:
        """The hash of the initial weights, whatever the order of the ranks."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self.ranks[0].initial.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Comparison:
    """The differences of a layout from one process: the worst relative ones.

    `first`: the first parameter, in the model's order, in which the mistake shows. `where`: the
    part of the step that has it.
    """

    initial_hash: str
    loss: float
    norm: float
    update: float
    loss64: float
    norm64: float
    gradient64: float
    verdict: Literal["same", "rounding", "mistake"]
    first: str | None = None
    where: str = ""

    @property
    def agrees(self) -> bool:
        return self.verdict != "mistake"


def compare(got: Outcome, expected: Outcome) -> Comparison:
    ours, theirs = got.ranks[0], expected.ranks[0]
    update, gradient = tensor_differences(got.update, expected.update), tensor_differences(got.gradient, expected.gradient)
    fp32 = (
        number_difference(ours.losses, theirs.losses),
        number_difference(ours.norms, theirs.norms),
        max(update.values()),
    )
    float64 = (
        number_difference(ours.losses64, theirs.losses64),
        number_difference(ours.norms64, theirs.norms64),
        max(gradient.values()),
    )
    mistakes = chain(
        _at_start(got, expected),
        _in_float64(ours, theirs, gradient),
        _after_the_gradient(fp32, update),
        _in_the_optimizer(ours, theirs),
        _between_ranks(got),
    )
    mistake = next(mistakes, None)
    if mistake is None:
        return Comparison(got.initial_hash, *fp32, *float64, "rounding" if any(fp32 + float64) else "same")
    return Comparison(got.initial_hash, *fp32, *float64, "mistake", first=mistake[0], where=mistake[1])


Mistake = tuple[str | None, str]


def _at_start(got: Outcome, expected: Outcome) -> Iterator[Mistake]:
    ours, theirs = got.ranks[0].initial, expected.ranks[0].initial
    for name in expected.names:
        if ours.get(name) != theirs[name]:
            yield name, "initial weights"
    if got.ranks[0].targets != expected.ranks[0].targets:
        yield None, "number of targets"


def _in_float64(got: RankResult, expected: RankResult, gradient: Mapping[str, float]) -> Iterator[Mistake]:
    for name, difference in gradient.items():
        if not difference < ROUNDING_FLOAT64:
            yield name, "gradient"
    # The first steps of SGD and of the own optimizer, both from the initial weights.
    start = slice(2)
    if not number_difference(got.losses64[start], expected.losses64[start]) < ROUNDING_FLOAT64:
        yield None, "loss"
    if not number_difference(got.norms64[start], expected.norms64[start]) < ROUNDING_FLOAT64:
        yield None, "gradient norm"


def _after_the_gradient(worst: Sequence[float], update: Mapping[str, float]) -> Iterator[Mistake]:
    if not all(difference < ROUNDING_FP32 for difference in worst):
        first = next((name for name, difference in update.items() if not difference < ROUNDING_FP32), None)
        yield first, "after the gradient: ZeRO, clipping, decay or optimizer"


def _in_the_optimizer(got: RankResult, expected: RankResult) -> Iterator[Mistake]:
    later = number_difference(got.losses64 + got.norms64, expected.losses64 + expected.norms64)
    if not later < ROUNDING_FLOAT64:
        yield None, "optimizer or clipping"


def _between_ranks(got: Outcome) -> Iterator[Mistake]:
    if any(rank.numbers != got.ranks[0].numbers for rank in got.ranks):
        yield None, "ranks have different losses or norms"
    held: dict[str, str] = {}
    for rank in got.ranks:
        for box, digest in rank.boxes.items():
            if held.setdefault(box, digest) != digest:
                yield box.partition(" ")[0], "copies on several ranks drift apart"


def tensor_differences(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the largest difference in each tensor relative to its largest element (see FLOOR), in
    the order of `expected`.

    It is infinite if a tensor is missing or not finite.
    """
    largest = {name: float(np.abs(tensor).max(initial=0.0)) for name, tensor in expected.items()}
    floor = FLOOR * max(largest.values())
    return {
        name: _relative(float(np.abs(got[name] - tensor).max(initial=0.0)), max(largest[name], floor))
        if name in got and got[name].shape == tensor.shape
        else math.inf
        for name, tensor in expected.items()
    }


def number_difference(got: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference."""
    if len(got) != len(expected):
        return math.inf
    return max(_relative(abs(a - b), abs(b)) for a, b in zip(got, expected, strict=True))


def _relative(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 and math.isfinite(difference) and math.isfinite(scale) else math.inf
