"""Linear layers: column- and row-parallel (Shoeybi et al. 2019, arXiv:1909.08053, §3), and whole on every rank.

Shape letters: N tokens of a micro-batch, I input features, O output features; a capital keeps its letter when it is local.
Weights are stored [O, I] as torch does, Y = X Wᵀ + b, whatever the logical tensor's orientation. With sequence parallelism
the activations outside the pair of layers are [N/p, ·], this rank's tokens.

All layers compute in the format of their input: a weight kept in fp32 (ZeRO-0 in bf16 or fp16) is cast on use, so its
gradient accumulates in fp32; where DeepSpeed already holds low-precision copies the cast is nothing. A quantized weight is
made whole for each product, in forward and in backward, and never kept between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.autograd import TensorFunction
from parallel.collectives import Pending, all_gather, start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.deferred import WeightGradients
from parallel.mesh import Group
from parallel.outputs import Output
from parallel.params import Init, Role, Sharded, ShardSpec, whole
from parallel.pieces import Piece
from parallel.quantized import QuantizedWeight
from parallel.rng import Streams
from parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Shard:
    """The features of an output that a rank has: [first, first + features) of its Hugging Face module, from `row` on of the
    local weight."""

    output: Output
    first: int
    features: int
    row: int


class Beside(Protocol):
    """A module that parameter-efficient tuning puts beside a linear layer, whose parameters are then the layer's too."""

    def __call__(self, layer: Any, x_NI: Tensor, streams: Streams | None) -> Tensor:
        """The output for this input of the layer (whose own part is `layer.plain`); `streams` None: no dropout."""

    def start_from(self, layer: Any) -> None:
        """Set what follows from the layer's own weights."""


class _ColumnParallelLinear(TensorFunction):
    """Y = X Wᵀ + b, for two weights whose outputs stand side by side (the second may be None).

    Backward: dX = Σ over ranks of dY W, dW = dYᵀ X, db = Σ dY. Written out for what autograd cannot do: with sequence
    parallelism X is kept as this rank's tokens and gathered again while dY W is computed, and the sum of dX over the ranks
    runs while dYᵀ X is computed (Narayanan et al. 2021, arXiv:2104.04473; Korthikanti et al. 2022, arXiv:2205.05198, §4.2.2),
    or dYᵀ X is left for later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        tp: TensorParallel,
        later: _Later,
        weight: Tensor | None,
        bias: Tensor | None,
        shared_weight: Tensor | None,
        shared_bias: Tensor | None,
    ) -> Tensor:
        ctx.tp = tp
        ctx.later = later
        ctx.save_for_backward(x_NI, weight, shared_weight)
        all_NI = all_gather(x_NI, tp.group) if tp.sequence else x_NI
        weights = later.values(x_NI.dtype, weight, shared_weight)
        parts = [_linear(all_NI, *part) for part in zip(weights, (bias, shared_bias), strict=False)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        x_NI, *seen = ctx.saved_tensors
        weights = ctx.later.values(dy_NO.dtype, *seen)
        parts = dy_NO.split([w.shape[0] for w in weights], -1)

        gathering = start_all_gather(x_NI, tp.group) if tp.sequence else Pending(x_NI, None)
        if not tp.overlap:
            gathering.wait()
        dx_NI = parts[0] @ weights[0].to(dy_NO.dtype)
        for part, shared_weight in zip(parts[1:], weights[1:], strict=True):
            dx_NI.addmm_(part, shared_weight.to(dy_NO.dtype))
        summing = (start_reduce_scatter if tp.sequence else start_all_reduce)(dx_NI, tp.group)
        if not tp.overlap:
            summing.wait()
        all_NI = gathering.wait()
        dws = [ctx.later.gradient(index, w, dy, all_NI) for index, (w, dy) in enumerate(zip(weights, parts, strict=True))]
        dbs = [dy.sum(0).to(weights[0].dtype) if ctx.needs_input_grad[4] else None for dy in parts]
        (dw, shared_dw), (db, shared_db) = ((*grads, None)[:2] for grads in (dws, dbs))
        return summing.wait(), None, None, dw, db, shared_dw, shared_db


class _LinearForLater(TensorFunction):
    """Y = X Wᵀ whose weight gradient is left for later, or never wanted. Backward: dX = dY W."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, later: _Later, weight: Tensor | None) -> Tensor:
        ctx.later = later
        ctx.save_for_backward(x_NI, weight)
        (value,) = later.values(x_NI.dtype, weight)
        return _linear(x_NI, value, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, None, None]:
        x_NI, seen = ctx.saved_tensors
        (weight,) = ctx.later.values(dy_NO.dtype, seen)
        ctx.later.gradient(0, weight, dy_NO, x_NI)
        return dy_NO @ weight.to(dy_NO.dtype), None, None


@dataclass(frozen=True)
class _Later:
    """Where weight gradients go: back to autograd, or, with `deferred`, there for these weights. Autograd then gets the
    weights detached: an edge without a gradient would still run the hooks of ZeRO. It never sees quantized ones."""

    deferred: WeightGradients | None
    weights: tuple[nn.Parameter | QuantizedWeight | None, ...]

    def seen_by_autograd(self, index: int) -> Tensor | None:
        weight = self.weights[index]
        if weight is None or isinstance(weight, QuantizedWeight):
            return None
        return weight if self.deferred is None else weight.detach()

    def values(self, dtype: torch.dtype, *seen: Tensor | None) -> list[Tensor]:
        """Those that there are: as autograd saw them, or made whole in `dtype`."""
        every = (
            held.dequantized(dtype) if isinstance(held, QuantizedWeight) else weight
            for held, weight in zip(self.weights, seen, strict=True)
        )
        return [value for value in every if value is not None]

    def gradient(self, index: int, weight: Tensor, dy_NO: Tensor, x_NI: Tensor) -> Tensor | None:
        """dYᵀ X in the weight's format; None when it is left for later, or the weight is frozen."""
        leaf = self.weights[index]
        if not isinstance(leaf, nn.Parameter) or not leaf.requires_grad:
            return None

        def product() -> Tensor:
            return (dy_NO.t() @ x_NI).to(weight.dtype)

        if self.deferred is None:
            return product()
        self.deferred.put(leaf, product)
        return None


def _linear(x_NI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the format of x."""
    return functional.linear(x_NI, weight.to(x_NI.dtype), None if bias is None else bias.to(x_NI.dtype))


class _Adaptable(Sharded):
    """A layer that may have something trained beside it, and then weights in few bits."""

    weight: nn.Parameter  # unless it is quantized

    def __init__(self) -> None:
        super().__init__()
        self.beside: Beside | None = None
        self.quantized: dict[str, QuantizedWeight] = {}  # in place of parameters of these names

    @property
    def module_names(self) -> frozenset[str]:
        """The Hugging Face modules whose outputs it computes."""
        raise NotImplementedError

    def quantize(self, form: str) -> None:
        """Hold the weights, which must be filled and frozen, in this format from now on."""
        for name in ("weight", "shared_weight"):
            if (weight := self.given(name)) is not None:
                self.quantized[name] = QuantizedWeight.of(weight.detach(), self.specs.pop(name), form)
                delattr(self, name)
        self.derive()

    def given(self, name: str) -> nn.Parameter | None:
        """A parameter that the layer may have."""
        return getattr(self, name) if name in self.specs else None

    def held(self, name: str) -> nn.Parameter | QuantizedWeight | None:
        """A weight that the layer may have, in the form in which it is here."""
        return self.quantized.get(name) or self.given(name)

    def values(self, name: str) -> Tensor:
        """Of a weight that the layer has; fp32 where it is quantized."""
        return self.quantized[name].dequantized(torch.float32) if name in self.quantized else self.get_parameter(name)

    def forward(self, x_NI: Tensor, streams: Streams | None = None) -> Tensor:
        """`streams`: for the dropout of what is beside the layer."""
        return self.plain(x_NI) if self.beside is None else self.beside(self, x_NI, streams)

    def derive(self) -> None:
        if self.beside is not None:
            self.beside.start_from(self)

    def plain(self, x_NI: Tensor) -> Tensor:
        """The layer's own output for this input."""
        raise NotImplementedError


class ColumnParallelLinear(_Adaptable):
    """Y = X Aᵀ + b with the rows of A, the output features, divided: A = [A_1; …; A_p], Y_i = X A_iᵀ + b_i.

    Several outputs (q, k, v or gate, up) are fused in one matrix product. Each is divided on its own, so a rank's weight
    is [its rows of q; its rows of k; its rows of v] at any degree that divides them. `shared` outputs have fewer parts than
    there are ranks (key/value heads): the ranks of `copies`, neighbours in the group, hold the same part and each computes
    with it for its own consumers, so their gradients are partial.

    Forward: X [N, I] or this rank's tokens of it → Y [N, O/p], the shared outputs last. Backward: dX = Σ_i dY_i A_i over the
    group. Communication with sequence parallelism: an all-gather forward, an all-gather and a reduce-scatter backward;
    without: an all-reduce backward.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[Output],
        *,
        bias: bool,
        init: Init,
        transposed: bool,
        tp: TensorParallel,
        shared: Sequence[Output] = (),
        copies: Group | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.in_features, self.init, self.transposed = in_features, init, transposed
        self.copies = Group.alone() if copies is None else copies
        self.local_shards = self._declare("", outputs, bias, Group.alone())
        self.shared_shards: list[Shard] = []
        if shared:
            assert copies is not None, "shared outputs need to know who shares them"
            self.shared_shards = self._declare("shared_", shared, bias, copies)

    @property
    def module_names(self) -> frozenset[str]:
        return frozenset(shard.output.name for shard in (*self.local_shards, *self.shared_shards))

    def _declare(self, prefix: str, outputs: Sequence[Output], bias: bool, copies: Group) -> list[Shard]:
        """Weight and bias of outputs that are cut into one part for each `copies` ranks; what is here of each."""
        parts, part = self.tp.group.size // copies.size, self.tp.group.rank // copies.size
        weights, biases = [], []
        shards: list[Shard] = []
        for out in outputs:
            if out.features % parts:
                raise ValueError(f"{out.name}: output features = {out.features} does not divide over {parts} ranks")
            local, row = out.features // parts, sum(shard.features for shard in shards)
            first = out.offset + part * local
            shape, start, size = (out.of, self.in_features), (first, 0), (local, self.in_features)
            if self.transposed:
                shape, start, size = shape[::-1], start[::-1], size[::-1]
            weights.append(Piece(f"{out.name}.weight", shape, start, size, row, self.transposed, out.gain))
            biases.append(Piece(f"{out.name}.bias", (out.of,), (first,), (local,), row))
            shards.append(Shard(out, first, local, row))
        features = sum(shard.features for shard in shards)
        partial = copies.size > 1
        spec = ShardSpec(Role.MATRIX, self.init, tuple(weights), copies, partial)
        self.declare(f"{prefix}weight", (features, self.in_features), spec)
        if bias:
            self.declare(f"{prefix}bias", (features,), ShardSpec(Role.BIAS, Init(), tuple(biases), copies, partial))
        return shards

    def plain(self, x_NI: Tensor) -> Tensor:
        """The layer's own output for this input."""
        if self.tp.group.size == 1 and self.tp.deferred is None and not self.quantized:
            return _linear(x_NI, self.weight, self.given("bias"))
        later = _Later(self.tp.deferred, (self.held("weight"), self.held("shared_weight")))
        weight, shared_weight = later.seen_by_autograd(0), later.seen_by_autograd(1)
        bias, shared_bias = self.given("bias"), self.given("shared_bias")
        return _ColumnParallelLinear.apply(x_NI, self.tp, later, weight, bias, shared_weight, shared_bias)


class RowParallelLinear(_Adaptable):
    """Y = X Aᵀ + b with the columns of A, the input features, divided: Y = Σ_i X_i A_iᵀ + b.

    Forward: X_i [N, I/p] → Y [N, O], or this rank's tokens of it; the bias is added once, after the sum over the group.
    Backward: dX_i = dY A_i. Communication: an all-reduce forward; with sequence parallelism a reduce-scatter forward and an
    all-gather backward, and the bias sees only this rank's tokens: its gradient is partial.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, name: str, bias: bool, init: Init, transposed: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp = tp
        self.name, self.in_features, self.out_features = name, in_features, out_features
        local = tp.group.part(in_features, f"{name}: input features")
        shape, start, size = (out_features, in_features), (0, tp.group.rank * local), (out_features, local)
        if transposed:
            shape, start, size = shape[::-1], start[::-1], size[::-1]
        piece = Piece(f"{name}.weight", shape, start, size, 0, transposed)
        self.declare("weight", (out_features, local), ShardSpec(Role.MATRIX, init, (piece,), Group.alone()))
        if bias:
            spec = whole(f"{name}.bias", (out_features,), role=Role.BIAS, init=Init(), copies=tp.group, partial=tp.sequence)
            self.declare("bias", (out_features,), spec)
        else:
            self.bias = None

    @property
    def module_names(self) -> frozenset[str]:
        return frozenset((self.name,))

    def plain(self, x_NI: Tensor) -> Tensor:
        """The layer's own output for this input."""
        if self.tp.deferred is None and not self.quantized:
            y_NO = self.tp.leave(_linear(x_NI, self.weight, None))
        else:
            later = _Later(self.tp.deferred, (self.held("weight"),))
            y_NO = self.tp.leave(_LinearForLater.apply(x_NI, later, later.seen_by_autograd(0)))
        return y_NO if self.bias is None else y_NO + self.bias.to(y_NO.dtype)


class ReplicatedLinear(Sharded):
    """Y = X Aᵀ + b between the parallel regions, whole on every rank; without `bias` Y = X Aᵀ.

    Forward: X [N, I], or this rank's tokens of it → Y [N, O] of the same tokens; no communication. With sequence parallelism
    each rank gives its tokens' part of the gradients; without, all ranks compute the same.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        init: Init,
        tp: TensorParallel,
        bias: bool = True,
        added: bool = False,
    ) -> None:
        """`added`: put beside the model's own weights for tuning."""
        super().__init__()
        self.register_parameter("bias", None)
        parameters = [("weight", (out_features, in_features), Role.MATRIX, init), ("bias", (out_features,), Role.BIAS, Init())]
        for what, shape, role, start in parameters[: 1 + bias]:
            spec = whole(f"{name}.{what}", shape, role=role, init=start, copies=tp.group, partial=tp.sequence, added=added)
            self.declare(what, shape, spec)

    def forward(self, x_NI: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_NI.dtype)
        return functional.linear(x_NI, self.weight.to(x_NI.dtype), bias)
