"""LoRA, DoRA and AdaLoRA around parallel linear layers, whose weights W are frozen.

* LoRA (Hu et al. 2021, arXiv:2106.09685): Y = X Wᵀ + s · X Aᵀ Bᵀ.
* DoRA (Liu et al. 2024, arXiv:2402.09353) also trains the length m of each row of W + s · B A,
  apart from its direction: Y = (X Wᵀ + s · X Aᵀ Bᵀ) · m / ‖W + s · B A‖. Backward takes the norm
  for a constant, as §4.3 there does.
* AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, §3.1) puts one value for each inner feature between
  the factors: Y = X Wᵀ + s · X Aᵀ diag(E) Bᵀ. Setting a value to 0 drops its feature.

Shape letters: N tokens of a micro-batch, I input features, O output features, R rank; a capital
keeps its letter when it is local. Each logical projection has an A [R, I] and a B [O, R] of its
own, named after its Hugging Face module, even where several projections are fused into one layer
here.

The factor next to the divided dimension is divided as W is, and the other is whole on every rank.
The ranks exchange what passes between the two, because it is only R wide:

| layer | A | B | between them |
|---|---|---|---|
| column-parallel | whole, sees this rank's tokens | divided by rows like W | enters the region |
| row-parallel | divided by columns like W | whole, sees this rank's tokens | leaves it |

A whole factor that sees this rank's tokens only, under sequence parallelism, has partial gradients.
E is whole on every rank and multiplies what lies outside the region, so its gradients are partial
in the same case. m is divided like the rows of W; for the norm in a row-parallel layer each rank
squares its own columns, and the squares are summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.linear import ColumnParallelLinear, RowParallelLinear, Shard
from parallel.mesh import Group
from parallel.params import Init, Role, Sharded, ShardSpec, whole
from parallel.pieces import Piece
from parallel.products import linear
from parallel.rng import Streams, dropout


@dataclass(frozen=True)
class LowRank:
    """The settings of low-rank factors.

    `scale`: factor on X Aᵀ Bᵀ. `dropout`: rate on the X that A sees. `magnitude`: train m too
    (DoRA). `singular_values`: train E (AdaLoRA).
    """

    rank: int
    scale: float
    dropout: float = 0.0
    magnitude: bool = False
    singular_values: bool = False

    def name(self, module: str, factor: str) -> str:
        """Return peft's name of a factor. AdaLoRA's factors are parameters there, not layers."""
        return f"{module}.{factor}" if self.singular_values else f"{module}.{factor}.weight"

    def first_factor(self, in_features: int) -> Init:
        """Return how A starts: as in peft, uniform in ±1/√I (kaiming_uniform with a = √5);
        AdaLoRA's is normal."""
        return Init(std=0.02) if self.singular_values else Init(bound=1.0 / math.sqrt(in_features))

    def second_factor(self) -> Init:
        """Return how B starts: at 0, so that Y starts as X Wᵀ. AdaLoRA draws it like A, because E
        starts at 0."""
        return Init(std=0.02) if self.singular_values else Init()


@dataclass(frozen=True)
class InputDropout:
    """A dropout on what one module's A sees. `features`: the part of the module's inputs that this
    rank has."""

    module: str
    rate: float
    in_features: int
    features: slice

    def __call__(self, x_NI: Tensor, streams: Streams | None, tokens: slice, num_tokens: int) -> Tensor:
        """Return x with features dropped; with `streams` None x as it is. x has `tokens` of the
        micro-batch's `num_tokens`."""
        if not self.rate or streams is None:
            return x_NI
        shape = num_tokens // len(streams.seeds), self.in_features
        keeps_NI = streams.keeps_features(f"{self.module}.lora", self.rate, shape, tokens, x_NI.device)
        return dropout(x_NI, keeps_NI[:, self.features], self.rate)


class ColumnLowRank(Sharded):
    """The factors beside a column-parallel layer, for those of its outputs that belong to
    `modules`.

    Forward: X [N, I], or this rank's tokens of it → H = X Aᵀ [N, R] of each module, in one product
    for all where nothing is dropped → all tokens → Y + s · H Bᵀ. Communication: an all-reduce
    backward; with sequence parallelism instead an all-gather of H forward and a reduce-scatter of
    its gradient backward.
    """

    lora_A: nn.Parameter
    lora_E: nn.Parameter  # AdaLoRA's

    def __init__(self, layer: ColumnParallelLinear, modules: Collection[str], keys: LowRank) -> None:
        super().__init__()
        self.tp, self.keys = layer.tp, keys
        shards = [*layer.local_shards, *layer.shared_shards]
        # A module that holds q, k and v has one A for all of them, as it has in peft.
        self.modules_here = list(dict.fromkeys(s.output.name for s in shards if s.output.name in modules))
        self.features = [shard.features for shard in shards]
        self.own_shards = len(layer.local_shards)
        self.module_of = [
            self.modules_here.index(s.output.name) if s.output.name in self.modules_here else None for s in shards
        ]
        I = layer.in_features  # noqa: E741
        self._declare_whole("lora_A", I, Role.MATRIX, [keys.name(module, "lora_A") for module in self.modules_here])
        if keys.singular_values:
            self._declare_whole("lora_E", 1, Role.NORM, [keys.name(module, "lora_E") for module in self.modules_here])
        self._declare_second("", layer.local_shards, Group.alone())
        self._declare_second("shared_", layer.shared_shards, layer.copies)
        self.dropouts = [InputDropout(module, keys.dropout, I, slice(None)) for module in self.modules_here]

    def _declare_whole(self, name: str, columns: int, role: Role, pieces: list[str]) -> None:
        """Declare a parameter that is whole on every rank and has R rows for each module."""
        R, start = self.keys.rank, self.keys.first_factor(columns) if role is Role.MATRIX else Init()
        boxes = (Piece(piece, (R, columns), (0, 0), (R, columns), row * R) for row, piece in enumerate(pieces))
        spec = ShardSpec(role, start, tuple(boxes), self.tp.group, self.tp.sequence, added=True)
        self.declare(name, (R * len(pieces), columns), spec)

    def _declare_second(self, prefix: str, shards: list[Shard], copies: Group) -> None:
        adapted = [shard for shard in shards if shard.output.name in self.modules_here]
        pieces, rows, R = [], 0, self.keys.rank
        for s in adapted:
            name = self.keys.name(s.output.name, "lora_B")
            pieces.append(Piece(name, (s.output.of, R), (s.first, 0), (s.features, R), rows))
            rows += s.features
        if adapted:
            start = self.keys.second_factor()
            spec = ShardSpec(Role.MATRIX, start, tuple(pieces), copies, copies.size > 1, added=True)
            self.declare(f"{prefix}lora_B", (rows, R), spec)
        if adapted and self.keys.magnitude:
            lengths = tuple(
                _lengths(p.name.removesuffix(".lora_B.weight"), p.shape[0], p.start[0], p.size[0], p.row) for p in pieces
            )
            spec = ShardSpec(Role.NORM, Init(), lengths, copies, copies.size > 1, added=True)
            self.declare(f"{prefix}magnitude", (rows,), spec)

    def forward(self, layer: ColumnParallelLinear, x_NI: Tensor, streams: Streams | None) -> Tensor:
        h_NR = self.tp.enter(self._inside(x_NI, streams))
        hs, seconds, lengths = h_NR.split(self.keys.rank, -1), self._rows("lora_B"), self._rows("magnitude")
        firsts = self.lora_A.split(self.keys.rank)
        parts = []
        ys = layer.plain(x_NI).split(self.features, -1)
        weights = self._weights(layer) if self.keys.magnitude else [None] * len(ys)
        biases = self._biases(layer) if self.keys.magnitude else [None] * len(ys)
        for y, module, weight, bias in zip(ys, self.module_of, weights, biases, strict=True):
            if module is None:
                parts.append(y)
                continue
            b_OR = next(seconds)
            changed = torch.addmm(y, hs[module], b_OR.to(y.dtype).t(), alpha=self.keys.scale)
            if weight is not None:
                norm_O = _row_squares(weight, b_OR, firsts[module], self.keys.scale).sqrt()
                changed = _rescaled(changed, next(lengths) / norm_O, bias)
            parts.append(changed)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.no_grad()
    def start_from(self, layer: ColumnParallelLinear) -> None:
        if not self.keys.magnitude:
            return
        weights = [w for w, module in zip(self._weights(layer), self.module_of, strict=True) if module is not None]
        for length, weight in zip(self._rows("magnitude"), weights, strict=True):
            length.copy_(weight.double().square().sum(-1).sqrt())

    def _rows(self, name: str) -> Iterator[Tensor]:
        """Yield, from this parameter, the rows of each adapted shard in turn."""
        for prefix, part in (("", slice(0, self.own_shards)), ("shared_", slice(self.own_shards, None))):
            shards = zip(self.features[part], self.module_of[part], strict=True)
            sizes = [features for features, module in shards if module is not None]
            if sizes and f"{prefix}{name}" in self.specs:
                yield from getattr(self, f"{prefix}{name}").split(sizes)

    def _weights(self, layer: ColumnParallelLinear) -> list[Tensor]:
        """Return the layer's weights, cut into the rows of each shard."""
        shared = layer.values("shared_weight") if layer.shared_shards else None
        return self._by_shard(layer.values("weight"), shared)

    def _biases(self, layer: ColumnParallelLinear) -> Sequence[Tensor | None]:
        bias = layer.given("bias")
        return [None] * len(self.features) if bias is None else self._by_shard(bias, layer.given("shared_bias"))

    def _by_shard(self, own: Tensor, shared: Tensor | None) -> list[Tensor]:
        parts = list(own.split(self.features[: self.own_shards]))
        return parts if shared is None else [*parts, *shared.split(self.features[self.own_shards :])]

    def _inside(self, x_NI: Tensor, streams: Streams | None) -> Tensor:
        """Return X Aᵀ of every module, side by side, for the tokens in x; with AdaLoRA times E."""
        h_NR = self._products(x_NI, streams)
        return h_NR * self.lora_E.flatten().to(h_NR.dtype) if self.keys.singular_values else h_NR

    def _products(self, x_NI: Tensor, streams: Streams | None) -> Tensor:
        a_RI = self.lora_A.to(x_NI.dtype)
        if not self.keys.dropout or streams is None:
            return linear(x_NI, a_RI)
        num_tokens = x_NI.shape[0] * (self.tp.group.size if self.tp.sequence else 1)
        tokens = self.tp.tokens(num_tokens)
        firsts = zip(self.dropouts, a_RI.split(self.keys.rank), strict=True)
        return torch.cat([linear(drop(x_NI, streams, tokens, num_tokens), a) for drop, a in firsts], -1)


class RowLowRank(Sharded):
    """The factors beside a row-parallel layer.

    Forward: X_i [N, I/p] → H = Σ_i X_i A_iᵀ [N, R], or this rank's tokens of it → Y + s · H Bᵀ.
    Communication: an all-reduce of H forward; with sequence parallelism instead a reduce-scatter of
    H forward and an all-gather of its gradient backward.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter  # AdaLoRA's
    magnitude: nn.Parameter  # DoRA's

    def __init__(self, layer: RowParallelLinear, keys: LowRank) -> None:
        super().__init__()
        self.tp, self.keys, self.module = layer.tp, keys, layer.name
        group, R, O = self.tp.group, keys.rank, layer.out_features  # noqa: E741
        local = group.part(layer.in_features, f"{layer.name}: input features")
        first = group.rank * local
        piece = Piece(keys.name(layer.name, "lora_A"), (R, layer.in_features), (0, first), (R, local))
        spec = ShardSpec(Role.MATRIX, keys.first_factor(layer.in_features), (piece,), Group.alone(), added=True)
        self.declare("lora_A", (R, local), spec)
        self._declare_whole("lora_B", (O, R), Role.MATRIX, keys.second_factor())
        if keys.singular_values:
            self._declare_whole("lora_E", (R, 1), Role.NORM, Init())
        if keys.magnitude:
            lengths = _lengths(layer.name, O, 0, O, 0)
            self.declare("magnitude", (O,), ShardSpec(Role.NORM, Init(), (lengths,), group, self.tp.sequence, added=True))
        self.drop = InputDropout(layer.name, keys.dropout, layer.in_features, slice(first, first + local))

    def _declare_whole(self, factor: str, shape: tuple[int, int], role: Role, start: Init) -> None:
        name = self.keys.name(self.module, factor)
        spec = whole(name, shape, role=role, init=start, copies=self.tp.group, partial=self.tp.sequence, added=True)
        self.declare(factor, shape, spec)

    def forward(self, layer: RowParallelLinear, x_NI: Tensor, streams: Streams | None) -> Tensor:
        num_tokens = x_NI.shape[0]
        x_in_NI = self.drop(x_NI, streams, slice(0, num_tokens), num_tokens)
        h_NR = self.tp.leave(linear(x_in_NI, self.lora_A.to(x_NI.dtype)))
        if self.keys.singular_values:
            h_NR = h_NR * self.lora_E.flatten().to(h_NR.dtype)
        y_NO = torch.addmm(layer.plain(x_NI), h_NR, self.lora_B.to(x_NI.dtype).t(), alpha=self.keys.scale)
        if not self.keys.magnitude:
            return y_NO
        squares_O = _row_squares(layer.values("weight"), self.lora_B, self.lora_A, self.keys.scale)
        return _rescaled(y_NO, self.magnitude / all_reduce(squares_O, self.tp.group).sqrt(), layer.bias)

    @torch.no_grad()
    def start_from(self, layer: RowParallelLinear) -> None:
        if self.keys.magnitude:
            squares_O = layer.values("weight").double().square().sum(-1)
            self.magnitude.copy_(all_reduce(squares_O, self.tp.group).sqrt())


@torch.no_grad()
def _row_squares(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """Return what this rank's columns add to ‖W + s · B A‖² of each row, in fp32 at least."""
    wide = torch.promote_types(a_RI.dtype, torch.float32)
    return torch.addmm(weight_OI.to(wide), b_OR.to(wide), a_RI.to(wide), alpha=scale).square().sum(-1)


def _rescaled(y_NO: Tensor, factor_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return the output multiplied by the factor, except for the bias, which stays as it is."""
    factor_O = factor_O.to(y_NO.dtype)
    if bias_O is None:
        return y_NO * factor_O
    bias_O = bias_O.to(y_NO.dtype)
    return (y_NO - bias_O) * factor_O + bias_O


def _lengths(module: str, of: int, first: int, features: int, row: int) -> Piece:
    """Return the piece that holds the magnitudes of a module's rows, named as in peft."""
    return Piece(f"{module}.lora_magnitude_vector", (of,), (first,), (features,), row)
