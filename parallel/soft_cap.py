"""Bounded logits (Gemma 2: Riviere et al. 2024, arXiv:2408.00118, §2, after Bello et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return cap · tanh(logits / cap): near the logits where they are small, never beyond ± cap."""
    return torch.tanh(logits / cap) * cap
