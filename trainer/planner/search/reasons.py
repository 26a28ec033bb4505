"""The reason why a layout loses against another, from the differences of their plans. No torch."""

from __future__ import annotations

from typing import NamedTuple

from trainer.planner.items import GIB
from trainer.planner.search.planned import Planned

# Parts of a difference that are named: the largest, and others of at least this share of it.
WORTH_NAMING = 0.3
SAME = 0.0005  # of a step's time


class Reason(NamedTuple):
    """The reason why a layout loses against the best: how much slower it is, and the parts that sum
    to the difference, both as shares of the best's time."""

    slower: float
    parts: dict[str, float]
    text: str


def reason(best: Planned, other: Planned) -> Reason:
    """Return why `other` loses."""
    mine, theirs = best.time.parts, other.time.parts
    parts = {name: (theirs[name] - mine[name]) / best.seconds for name in theirs}
    slower = other.seconds / best.seconds - 1
    return Reason(slower, parts, _text(best, other, slower, parts))


def _text(best: Planned, other: Planned, slower: float, parts: dict[str, float]) -> str:
    size = f"{other.num_bytes / GIB:,.1f} GiB"
    if other.prediction.fits is False:
        return f"does not fit: {size}"
    why = _why(best, other, slower, parts)
    if other.prediction.fits is None and best.prediction.fits:
        return f"too close to tell: {size}; {why}"
    return why


def _why(best: Planned, other: Planned, slower: float, parts: dict[str, float]) -> str:
    if abs(slower) < SAME:
        return f"as fast, with {(other.num_bytes - best.num_bytes) / GIB:+,.1f} GiB"
    sign = 1 if slower > 0 else -1
    towards = sorted(((sign * share, name) for name, share in parts.items() if sign * share > 0), reverse=True)
    largest = towards[0][0]
    named = [
        f"{_called(name, best, other)} {percent(sign * share)}" for share, name in towards if share >= WORTH_NAMING * largest
    ]
    return f"{percent(slower)}: {', '.join(named)}"


def _called(name: str, best: Planned, other: Planned) -> str:
    """Return what a part is called, with what makes it longer where that is known."""
    if name == "tensor sums" and crosses(other) and not crosses(best):
        return f"{name} across nodes"
    if name == "ZeRO":
        return _zero_called(other)
    if name == "compute" and _recomputes(other) > _recomputes(best):
        return "recomputation"
    return name


def _zero_called(planned: Planned) -> str:
    stage, count = planned.choice.zero_stage, planned.prediction.batch.num_micro_batches
    often = f"{count} micro-batches" if count > 1 else "a micro-batch"
    if stage < 2:
        return f"summing the gradients of {often}"
    return f"ZeRO-{stage}'s {'gathers' if stage == 3 else 'reductions'} for {often}"


def crosses(planned: Planned) -> bool:
    """Return whether the ranks of a tensor group are on several nodes."""
    device = planned.prediction.device
    return device is not None and planned.choice.tensor > device.per_node


def percent(share: float) -> str:
    """Return a share of the best's time as it is shown, with its sign."""
    return f"{100 * share:+.0f} %" if abs(share) >= 0.095 else f"{100 * share:+.1f} %"


def _recomputes(planned: Planned) -> int:
    return ("none", "selective", "full").index(planned.choice.recompute)
