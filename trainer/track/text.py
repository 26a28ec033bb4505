"""The formats of numbers for people, the same on the console and in the report."""

from __future__ import annotations

import math
import re

# Seconds of a large unit and of the small one that follows it, with their names.
_CLOCK = ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s"), (1, 1, "s", ""))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def short(value: float | None, digits: int = 4) -> str:
    """Return significant digits without noise: 3.1416 → "3.142", 0.0003 → "0.0003", 1.2e-9 →
    "1.2e-09", None → "–"."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(float(value))
    if value == int(value) and abs(value) < 10**6:
        return str(int(value))
    return f"{value:.{digits}g}"


def scaled(value: float | None) -> str:
    """Return three digits and an SI prefix: 12345 → "12.3 k", 10_400_000 → "10.4 M"; small values
    as in `short`."""
    if value is None or not math.isfinite(value) or abs(value) < 1000:
        return short(value, 3)
    for prefix in ("k", "M", "G", "T", "P", "E"):
        value /= 1000.0
        if abs(value) < 999.5 or prefix == "E":
            break
    return f"{value:#.3g}".rstrip(".") + f" {prefix}"


def tick(value: float) -> str:
    """Return a round number for an axis: 40000 → "40 k", 1500 → "1.5 k", 0.25 → "0.25"."""
    number, _, prefix = scaled(value).partition(" ")
    if "." in number and "e" not in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {prefix}".rstrip()


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float | None) -> str:
    """Return a time in at most two units: 0.5 → "0.50 s", 75 → "1 min 15 s", 93784 → "1 d 2 h"."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    large, small, unit, part = next(scale for scale in _CLOCK if whole >= scale[0])
    rest = whole % large // small
    return f"{whole // large} {unit}" + (f" {rest} {part}" if rest else "")


def printable(text: str) -> str:
    """Return the text without control characters, except newlines and tabs: a sample may hold any
    byte."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
