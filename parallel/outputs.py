"""What a fused linear layer produces, in the words of a Hugging Face checkpoint. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """Output features that a fused layer produces for one purpose, and where they live in Hugging Face's tensors.

    `name` is the Hugging Face module ("model.layers.0.self_attn.q_proj"); they are its features
    [offset, offset + features) of `total` (a module that fuses q, k and v itself is named by all three). `gain`: its weights
    start so many times as large as the layer's others.
    """

    name: str
    features: int
    offset: int = 0
    total: int | None = None
    gain: float = 1.0

    @property
    def of(self) -> int:
        return self.features if self.total is None else self.total
