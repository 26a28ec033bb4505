"""The sizes of what tuning puts beside a linear layer on one rank, from the recipe alone. No torch.

Each function has its class in `parallel/`, which declares the same parameters in the same order:
`low_rank.py`, `rescaling.py` and `bottleneck.py`. Shape letters: I input features, O output
features, R rank; both are this rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.schema import Tuning


@dataclass(frozen=True)
class Part:
    """A parameter: its shape, and whether it is a matrix, which decays."""

    shape: tuple[int, ...]
    is_matrix: bool = True


@dataclass(frozen=True)
class Outputs:
    """The rows of a column-parallel layer that belong to adapted modules, (module, rows) each;
    `shared` ones are on several ranks."""

    own: Sequence[tuple[str, int]]
    shared: Sequence[tuple[str, int]]

    @property
    def modules(self) -> int:
        return len(dict.fromkeys(module for module, _ in (*self.own, *self.shared)))

    @property
    def rows(self) -> list[int]:
        """The rows of each kind, where there are some."""
        return [sum(rows for _, rows in kind) for kind in (self.own, self.shared) if kind]


# From the inputs and the adapted outputs of a column-parallel layer, or the inputs and outputs of a
# row-parallel one.
Column = Callable[[Tuning, int, Outputs], list[Part]]
Row = Callable[[Tuning, int, int], list[Part]]


def low_rank(*, magnitude: bool = False, singular_values: bool = False) -> tuple[Column, Row]:
    """Return the sizes of factors beside layers of either kind."""

    def column(tuning: Tuning, I: int, outputs: Outputs) -> list[Part]:  # noqa: E741
        R = tuning.rank
        parts = [Part((R * outputs.modules, I))]
        parts += [Part((R * outputs.modules, 1), is_matrix=False)] * singular_values
        for rows in outputs.rows:
            parts.append(Part((rows, R)))
            parts += [Part((rows,), is_matrix=False)] * magnitude
        return parts

    def row(tuning: Tuning, I: int, O: int) -> list[Part]:  # noqa: E741
        R = tuning.rank
        parts = [Part((R, I)), Part((O, R))]
        parts += [Part((R, 1), is_matrix=False)] * singular_values
        return parts + [Part((O,), is_matrix=False)] * magnitude

    return column, row


def rescaled_outputs(tuning: Tuning, I: int, outputs: Outputs) -> list[Part]:  # noqa: E741
    return [Part((rows, 1), is_matrix=False) for rows in outputs.rows]


def rescaled_inputs(tuning: Tuning, I: int, O: int) -> list[Part]:  # noqa: E741
    return [Part((1, I), is_matrix=False)]


def bottleneck(tuning: Tuning, I: int, O: int) -> list[Part]:  # noqa: E741
    size = tuning.bottleneck
    biases = [Part((features,), is_matrix=False) for features in (size, O)]
    return [biases[0], Part((size, O)), biases[1], Part((O, size))]
