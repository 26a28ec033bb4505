"""The network that a run trains: one of our families, or any model of transformers (family "auto").
No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Network(Protocol):
    """A network that a run trains, as all parts of the run need it: `TransformerConfig`, or
    `AutoNetwork`.

    Everything else that depends on the kind of network is a generic function
    (`functools.singledispatch`) where it is computed: `config_json` here, `training_flops` in
    costs/, `make_execution` in engine/.
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
        """Return whether the model generates text, token after token."""

    @property
    def largest_weight(self) -> int:
        """Return the elements of the largest single weight."""

    def save_code(self, folder: Path) -> None:
        """Copy Python files that are part of the model into the folder of its exported weights."""
