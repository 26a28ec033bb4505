"""The outputs of a fused linear layer, named as in a Hugging Face checkpoint. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """A run of output features that a fused layer produces for one purpose, and their place in
    Hugging Face's tensors.

    `name` is the Hugging Face module ("model.layers.0.self_attn.q_proj"), and the features are its
    [offset, offset + features) of `total`. A module that fuses q, k and v itself is the name of all
    three. `gain`: the initial weights of these features are so many times the layer's others.
    """

    name: str
    features: int
    offset: int = 0
    total: int | None = None
    gain: float = 1.0

    @property
    def of(self) -> int:
        return self.features if self.total is None else self.total
