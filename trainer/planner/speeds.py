"""The speed of ranks on the cores of a machine, from what was measured there: an operation's time
is interpolated between measured ones of about its size. No torch.

A GPU's kernels cut their work into tiles, and that can be computed (`roofline.py`). What a CPU
reaches depends on caches, on the library, and on the ranks beside it, so it is measured:
`triaxis doctor --measure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

Figures = Mapping[str, Any]
# The weight of a measured point falls with the fourth power of its distance, in doublings: the next
# few points decide.
CLOSE = 1e-3


@dataclass(frozen=True)
class Table:
    """A value measured at points whose coordinates are sizes. Between them it is a mean of the
    values, the nearest ones weighing most."""

    points: tuple[tuple[tuple[float, ...], float], ...]

    @classmethod
    def of(cls, values: Mapping[tuple[float, ...], float]) -> Self:
        return cls(tuple((tuple(map(math.log2, sizes)), value) for sizes, value in values.items()))

    def at(self, *sizes: float) -> float:
        """Return the value at these sizes. It is averaged as a logarithm, since rates differ by
        factors."""
        here = [math.log2(max(size, 1e-9)) for size in sizes]
        total = weights = 0.0
        for point, value in self.points:
            distance = sum((a - b) ** 2 for a, b in zip(point, here, strict=True))
            weight = 1.0 / (distance + CLOSE) ** 2
            total += weight * math.log2(value)
            weights += weight
        return float(2.0 ** (total / weights))


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The speed of each of `ranks` processes that work at the same time with `threads` each.

    | field | value, by sizes |
    |---|---|
    | `products` | FLOP/s of a matrix product, by format; rows, columns, inner |
    | `attention` | FLOP/s of fused causal attention, whole squares counted, by format, direction; length, head dim |
    | `fresh`, `reused` | bytes/s of an operation into new memory, and into memory that is there, by format; bytes moved |
    | `joined` | bytes/s of laying tensors side by side, by format; bytes moved |
    | `functions` | evaluations/s of an activation, beside moving its tensors, by format |
    | `adam` | weights/s of fused AdamW with fp32 states; weights |
    | `call` | seconds in which Python issues an operation |
    | `steady` | mean seconds of a product among many |
    | `slowed` | how much longer all takes in a long run, by what stops the machine for a moment, and by more ranks |
    """

    ranks: int
    threads: int
    products: Mapping[str, Table]
    attention: Mapping[str, Mapping[str, Table]]
    fresh: Mapping[str, Table]
    reused: Mapping[str, Table]
    joined: Mapping[str, Table]
    functions: Mapping[str, float]
    adam: Table
    call: float
    steady: float
    slowed: float = 1.0

    @classmethod
    def of(cls, figures: Figures) -> Self:
        """Return the speeds that a sheet has of one number of ranks."""
        products: dict[str, dict[tuple[float, ...], float]] = {}
        for one in figures["products"]:
            if one["count"] == 1:
                sizes = (one["rows"], one["columns"], one["inner"])
                products.setdefault(one["dtype"], {})[sizes] = one["flops_per_s"]
        attention: dict[str, dict[str, dict[tuple[float, ...], float]]] = {}
        for one in figures["attention"]:
            for direction in ("forward", "backward"):
                tables = attention.setdefault(one["dtype"], {}).setdefault(direction, {})
                tables[one["length"], one["head_dim"]] = one[f"{direction}_flops_per_s"]
        return cls(
            ranks=figures["ranks"],
            threads=figures["threads"],
            products={dtype: Table.of(found) for dtype, found in products.items()},
            attention={dtype: {way: Table.of(t) for way, t in ways.items()} for dtype, ways in attention.items()},
            fresh=_by_format(figures["moves"], "fresh"),
            reused=_by_format(figures["moves"], "reused"),
            joined=_by_format(figures["moves"], "joined"),
            functions=dict(figures["functions_per_s"]),
            adam=Table.of({(one["elements"],): one["elements_per_s"] for one in figures["adam"]}),
            call=figures["call_s"],
            steady=figures["steady"]["seconds"],
            slowed=figures["steady"]["seconds"] / figures["steady"]["quartile_s"],
        )

    def shared_by(self, ranks: int) -> Speeds:
        """Return the speeds where more ranks share the cores than were measured: each has its part
        of the time."""
        return replace(self, slowed=self.slowed * max(1.0, ranks / self.ranks))

    def product_s(self, rows: int, columns: int, inner: int, dtype: str) -> float:
        """Return the seconds of a product of these sizes."""
        return self.slowed * 2.0 * rows * columns * inner / _of(self.products, dtype).at(rows, columns, inner)

    def attention_s(self, flops: float, length: int, head_dim: int, dtype: str, direction: str) -> float:
        """Return the seconds of fused attention; `flops`: of the whole square."""
        return self.slowed * flops / _of(self.attention, dtype)[direction].at(length, head_dim)

    def move_s(self, num_bytes: float, kernels: float, dtype: str, kind: str) -> float:
        """Return the seconds in which `kernels` operations move so many bytes in all."""
        if not num_bytes:
            return 0.0
        table: Table = _of(getattr(self, kind), dtype)
        return self.slowed * num_bytes / table.at(num_bytes / max(1, kernels))

    def functions_s(self, evaluations: float, dtype: str) -> float:
        return self.slowed * evaluations / _of(self.functions, dtype)

    def calls_s(self, calls: float) -> float:
        return self.slowed * calls * self.call

    def adam_s(self, elements: float) -> float:
        return self.slowed * elements / self.adam.at(max(elements, 1.0)) if elements else 0.0


Measured = TypeVar("Measured")


def _of(by_format: Mapping[str, Measured], dtype: str) -> Measured:
    """Return what was measured in a format; of fp32 where it was not."""
    return by_format.get(dtype, by_format["fp32"])


def _by_format(moves: Sequence[Figures], kind: str) -> dict[str, Table]:
    values: dict[str, dict[tuple[float, ...], float]] = {}
    for one in moves:
        if one["kind"] == kind:
            values.setdefault(one["dtype"], {})[one["bytes"],] = one["bytes_per_s"]
    return {dtype: Table.of(found) for dtype, found in values.items()}
