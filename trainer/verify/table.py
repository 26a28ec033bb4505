"""The output of `triaxis verify`. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from trainer.verify.command import Report, Row

COLUMNS = {
    "layout": "left",
    "weights": "left",
    "loss": "right",
    "norm": "right",
    "update": "right",
    "loss64": "right",
    "norm64": "right",
    "gradient64": "right",
    "verdict": "left",
    "first parameter that differs": "left",
}


def table(report: Report) -> Table:
    """Return a table with one row per layout."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, justify in COLUMNS.items():
        shown.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    shown.add_row("one process", report.initial_hash, *["–"] * 6, "reference", "")
    for row in report.rows:
        shown.add_row(*_cells(row))
    return shown


def legend(optimizer: str, zero_stage: int, steps: int) -> list[str]:
    """Return the meaning of the columns."""
    return [
        "weights: hash of the initial weights. The rest are the worst relative differences from one process at ZeRO-0.",
        f"loss, norm: one SGD step, then {steps} of {optimizer}; update: of the SGD step, because {optimizer} may hide a wrong "
        f"scale; fp32, ZeRO-{zero_stage} in the layouts.",
        "loss64, norm64, gradient64: the same in float64 at ZeRO-0, gradients before the optimizer, because DeepSpeed's ZeRO "
        "keeps fp32 master weights. Rounding falls below 1e-10 there, a mistake stays.",
    ]


def _cells(row: Row) -> list[str]:
    found = row.comparison
    if found is None:
        return [row.name, *["–"] * 7, "refused", row.refused]
    numbers = [found.loss, found.norm, found.update, found.loss64, found.norm64, found.gradient64]
    explained = f"{found.first or '–'} ({found.where})" if found.where else ""
    return [row.name, found.initial_hash, *(f"{number:.1e}" if number else "0" for number in numbers), found.verdict, explained]
