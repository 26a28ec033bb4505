"""LoRA around parallel linear layers: Y = X Wᵀ + s · X Aᵀ Bᵀ with W frozen (Hu et al. 2021, arXiv:2106.09685).

Shape letters: N tokens of a micro-batch, I input features, O output features, R rank; a capital keeps its letter when it is
local. A logical projection has A [R, I] and B [O, R] of its own, named after its Hugging Face module, whatever is fused here.

The factor that lies at the divided dimension is divided as W is, the other is whole on every rank, and what passes between
the two is R wide, so that is what the ranks exchange:

| layer | A | B | between them |
|---|---|---|---|
| column-parallel | whole, of this rank's tokens: partial under sequence parallelism | rows as those of W | into the region |
| row-parallel | columns as those of W | whole, of this rank's tokens: partial under sequence parallelism | out of it |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from parallel.linear import ColumnParallelLinear, RowParallelLinear, Shard
from parallel.mesh import Group
from parallel.params import Init, Piece, Role, Sharded, ShardSpec, whole
from parallel.rng import Streams, dropout


@dataclass(frozen=True)
class LowRank:
    """`scale`: what X Aᵀ Bᵀ is multiplied with; `dropout`: rate on the X that A sees."""

    rank: int
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class InputDropout:
    """Dropout of what A of one module sees; `features`: those of its inputs that this rank has."""

    module: str
    rate: float
    in_features: int
    features: slice

    def __call__(self, x_NI: Tensor, streams: Streams | None, tokens: slice, num_tokens: int) -> Tensor:
        """`tokens`: which of the micro-batch's `num_tokens` x has; `streams` None: x as it is."""
        if not self.rate or streams is None:
            return x_NI
        shape = num_tokens // len(streams.seeds), self.in_features
        keeps_NI = streams.keeps_features(f"{self.module}.lora", self.rate, shape, tokens, x_NI.device)
        return dropout(x_NI, keeps_NI[:, self.features], self.rate)


def first_factor(rank: int, in_features: int) -> Init:
    """A starts uniform in ±1/√I, which is what peft draws (kaiming_uniform with a = √5); B at 0, so that Y starts as X Wᵀ."""
    return Init(bound=1.0 / math.sqrt(in_features))


class ColumnLowRank(Sharded):
    """Beside a column-parallel layer, for those of its outputs that are of `modules`.

    Forward: X [N, I] or this rank's tokens of it → H = X Aᵀ [N, R] of each module, all in one product where nothing is
    dropped → all tokens → Y + s · H Bᵀ. Communication with sequence parallelism: an all-gather of H forward, a reduce-scatter
    of its gradient backward; without: an all-reduce backward.
    """

    def __init__(self, layer: ColumnParallelLinear, modules: Collection[str], keys: LowRank) -> None:
        super().__init__()
        self.tp, self.keys = layer.tp, keys
        shards = [*layer.local_shards, *layer.shared_shards]
        # A module that holds q, k and v has one A for all of them, as it has in peft.
        self.modules_here = list(dict.fromkeys(s.output.name for s in shards if s.output.name in modules))
        self.features = [shard.features for shard in shards]
        self.module_of = [
            self.modules_here.index(s.output.name) if s.output.name in self.modules_here else None for s in shards
        ]
        R, I = keys.rank, layer.in_features  # noqa: E741
        pieces = tuple(
            Piece(f"{module}.lora_A.weight", (R, I), (0, 0), (R, I), row) for row, module in _rows(self.modules_here, R)
        )
        copies, partial = self.tp.group, self.tp.sequence
        spec = ShardSpec(Role.MATRIX, first_factor(R, I), pieces, copies, partial, added=True)
        self.declare("lora_A", (R * len(pieces), I), spec)
        self._declare_second("", layer.local_shards, Group.alone())
        self._declare_second("shared_", layer.shared_shards, layer.copies)
        self.dropouts = [InputDropout(module, keys.dropout, I, slice(None)) for module in self.modules_here]

    def _declare_second(self, prefix: str, shards: list[Shard], copies: Group) -> None:
        adapted = [shard for shard in shards if shard.output.name in self.modules_here]
        pieces, rows, R = [], 0, self.keys.rank
        for s in adapted:
            pieces.append(Piece(f"{s.output.name}.lora_B.weight", (s.output.of, R), (s.first, 0), (s.features, R), rows))
            rows += s.features
        if adapted:
            spec = ShardSpec(Role.MATRIX, Init(), tuple(pieces), copies, copies.size > 1, added=True)
            self.declare(f"{prefix}lora_B", (rows, R), spec)

    def forward(self, base: Callable[[Tensor], Tensor], x_NI: Tensor, streams: Streams | None) -> Tensor:
        h_NR = self.tp.enter(self._inside(x_NI, streams))
        seconds = [getattr(self, name).to(x_NI.dtype) for name in ("lora_B", "shared_lora_B") if name in self.specs]
        adapted = [n for n, module in zip(self.features, self.module_of, strict=True) if module is not None]
        factors = iter(torch.cat(seconds).split(adapted) if len(seconds) > 1 else seconds[0].split(adapted))
        hs = h_NR.split(self.keys.rank, -1)
        parts = [
            y if module is None else torch.addmm(y, hs[module], next(factors).t(), alpha=self.keys.scale)
            for y, module in zip(base(x_NI).split(self.features, -1), self.module_of, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _inside(self, x_NI: Tensor, streams: Streams | None) -> Tensor:
        """X Aᵀ of every module, side by side, of the tokens in x."""
        a_RI = self.lora_A.to(x_NI.dtype)
        if not self.keys.dropout or streams is None:
            return functional.linear(x_NI, a_RI)
        num_tokens = x_NI.shape[0] * (self.tp.group.size if self.tp.sequence else 1)
        tokens = self.tp.tokens(num_tokens)
        firsts = zip(self.dropouts, a_RI.split(self.keys.rank), strict=True)
        return torch.cat([functional.linear(drop(x_NI, streams, tokens, num_tokens), a) for drop, a in firsts], -1)


class RowLowRank(Sharded):
    """Beside a row-parallel layer.

    Forward: X_i [N, I/p] → H = Σ_i X_i A_iᵀ [N, R], or this rank's tokens of it → Y + s · H Bᵀ. Communication: an all-reduce
    of H forward; with sequence parallelism a reduce-scatter of it forward, an all-gather of its gradient backward.
    """

    def __init__(self, layer: RowParallelLinear, keys: LowRank) -> None:
        super().__init__()
        self.tp, self.keys = layer.tp, keys
        group, R, O = self.tp.group, keys.rank, layer.out_features  # noqa: E741
        local = group.part(layer.in_features, f"{layer.name}: input features")
        first = group.rank * local
        piece = Piece(f"{layer.name}.lora_A.weight", (R, layer.in_features), (0, first), (R, local))
        spec = ShardSpec(Role.MATRIX, first_factor(R, layer.in_features), (piece,), Group.alone(), added=True)
        self.declare("lora_A", (R, local), spec)
        shape = (O, R)
        spec = whole(
            f"{layer.name}.lora_B.weight", shape, role=Role.MATRIX, init=Init(), copies=group, partial=self.tp.sequence
        )
        self.declare("lora_B", shape, replace(spec, added=True))
        self.drop = InputDropout(layer.name, keys.dropout, layer.in_features, slice(first, first + local))

    def forward(self, base: Callable[[Tensor], Tensor], x_NI: Tensor, streams: Streams | None) -> Tensor:
        num_tokens = x_NI.shape[0]
        x_in_NI = self.drop(x_NI, streams, slice(0, num_tokens), num_tokens)
        h_NR = self.tp.leave(functional.linear(x_in_NI, self.lora_A.to(x_NI.dtype)))
        return torch.addmm(base(x_NI), h_NR, self.lora_B.to(x_NI.dtype).t(), alpha=self.keys.scale)


def _rows(modules: list[str], rank: int) -> list[tuple[int, str]]:
    return [(index * rank, module) for index, module in enumerate(modules)]
