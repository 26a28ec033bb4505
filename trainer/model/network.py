"""What a run trains: a network of one of our families, or any model of transformers (family "auto"). No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Network(Protocol):
    """What a run trains, as far as every part of it asks: `TransformerConfig`, or `AutoNetwork`.

    What is computed of it otherwise for each kind is a generic function (`functools.singledispatch`) where it is computed:
    `config_json` here, `training_flops` in costs/, `make_execution` in engine/.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def causal(self) -> bool:
        """Return whether a token attends only to itself and those before it."""

    @property
    def max_positions(self) -> int | None:
        """Return the longest sequence [tokens], None where it is not known."""

    @property
    def writes(self) -> bool:
        """Return whether its model gives one token after another."""

    @property
    def largest_weight(self) -> int:
        """Return the elements of the largest single weight."""

    def save_code(self, folder: Path) -> None:
        """Put Python files that are part of the model beside its exported weights."""
