"""The training step as users of plain PyTorch write it, around any model. It imports nothing but
torch, so that peers in other environments take the same step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The result of a contender's step: (loss, gradient norm before clipping).
Numbers = tuple[float, float]


@dataclass(frozen=True)
class Update:
    """The settings of AdamW and of clipping; matrices alone decay."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float

    def groups(self, named: dict[str, Tensor], matrices: Collection[str]) -> list[dict[str, Any]]:
        """Return the two groups of an optimizer."""
        return [
            {"params": [p for name, p in named.items() if name in matrices], "weight_decay": self.weight_decay},
            {"params": [p for name, p in named.items() if name not in matrices], "weight_decay": 0.0},
        ]

    def adamw(self, named: dict[str, Tensor], matrices: Collection[str]) -> torch.optim.AdamW:
        groups = self.groups(named, matrices)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class PlainLoop:
    """A loop of steps on one batch.

    In bf16 the model has a bf16 copy of fp32 master weights, which is refreshed after each step;
    gradients are clipped, and moments kept, in fp32.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], update: Update, matrices: Collection[str], dtype: torch.dtype
    ) -> None:
        """Start from the model's weights, which are fp32; `loss` does the forward."""
        self.model, self.loss, self.update = model, loss, update
        self.parameters = self.masters = list(model.parameters())
        if dtype != torch.float32:
            self.masters = [parameter.detach().clone() for parameter in self.parameters]
            # Not `model.to(dtype)`, which would also round the rotary frequencies.
            for parameter in self.parameters:
                parameter.data = parameter.data.to(dtype)
        names = (name for name, _ in model.named_parameters())
        self.optimizer = update.adamw(dict(zip(names, self.masters, strict=True)), matrices)

    def step(self) -> Numbers:
        loss = self.loss()
        loss.backward()
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(self.masters, self.update.clip_norm)
        self.optimizer.step()
        if self.masters is not self.parameters:
            torch._foreach_copy_([parameter.data for parameter in self.parameters], self.masters)
        self.model.zero_grad()
        return float(loss.detach()), float(norm)
