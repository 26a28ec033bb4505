"""Linear layers: column- and row-parallel (Shoeybi et al. 2019, arXiv:1909.08053, §3), and whole
on every rank.

Shape letters: N tokens of a micro-batch, I input features, O output features; a capital keeps its
letter when it is local. Weights are stored [O, I] as torch does, Y = X Wᵀ + b, whatever the
logical tensor's orientation. With sequence parallelism the activations outside the pair of layers
are [N/p, ·], this rank's tokens.

All layers compute in the format of their input: a weight kept in fp32 (ZeRO-0 in bf16 or fp16) is
cast on use, so its gradient accumulates in fp32; where DeepSpeed already holds low-precision
copies the cast is nothing. A quantized weight is made whole for each product, in forward and in
backward, and never kept between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.autograd import TensorFunction
from parallel.collectives import Pending, all_gather, start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.deferred import WeightGradients
from parallel.mesh import Group
from parallel.outputs import Output
from parallel.params import Init, Role, Sharded, ShardSpec, whole
from parallel.pieces import Piece
from parallel.products import add_product, linear, product
from parallel.quantized import QuantizedWeight
from parallel.rng import Streams
from parallel.tensor import TensorParallel

WEIGHTS = ("weight", "shared_weight")  # the matrices that a layer may have


@dataclass(frozen=True)
class Shard:
    """The features of an output that a rank has: [first, first + features) of its Hugging Face
    module, from `row` on of the local weight."""

    output: Output
    first: int
    features: int
    row: int


class Beside(Protocol):
    """A module that parameter-efficient tuning puts beside a linear layer, whose parameters are
    then the layer's too."""

    def __call__(self, layer: Any, x_NI: Tensor, streams: Streams | None) -> Tensor:
        """Return the output for this input of the layer, whose own part is `layer.plain`; `streams`
        None: no dropout."""

    def start_from(self, layer: Any) -> None:
        """Set what follows from the layer's own weights."""


class Weight(Protocol):
    """A matrix [O, I] as the autograd function below uses it."""

    @property
    def seen(self) -> Tensor | None:
        """The tensor that autograd sees, and keeps until backward."""

    def value(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the matrix in this format; `seen`: as autograd kept it."""

    def gradient(self, dy_NO: Tensor, x_NI: Tensor) -> Tensor | None:
        """Return dYᵀ X for autograd; None if it gets none, or not now."""


@dataclass(frozen=True)
class PlainWeight:
    """A parameter. With `deferred` its gradient is left there, and autograd sees the matrix
    detached: an edge without a gradient would still run the hooks of ZeRO."""

    parameter: nn.Parameter
    deferred: WeightGradients | None

    @property
    def seen(self) -> Tensor:
        return self.parameter if self.deferred is None else self.parameter.detach()

    def value(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
        # Not the parameter itself: when a layer is recomputed, ZeRO-3 has divided it again by then.
        assert seen is not None
        return seen.to(dtype)

    def gradient(self, dy_NO: Tensor, x_NI: Tensor) -> Tensor | None:
        if not self.parameter.requires_grad:
            return None

        def computed() -> Tensor:
            return product(dy_NO.t(), x_NI).to(self.parameter.dtype)

        if self.deferred is None:
            return computed()
        self.deferred.put(self.parameter, computed)
        return None


class _Linear(TensorFunction):
    """Y = X Wᵀ + b, for weights whose outputs stand side by side, each with its bias or None.

    Backward: dX = Σ over ranks of dY W, dW = dYᵀ X, db = Σ dY. Written out for what autograd
    cannot do: with sequence parallelism X is kept as this rank's tokens and gathered again while
    dY W is computed, and the sum of dX over the ranks runs while dYᵀ X is computed (Narayanan et
    al. 2021, arXiv:2104.04473; Korthikanti et al. 2022, arXiv:2205.05198, §4.2.2), or dYᵀ X is
    left for later; a quantized weight is made whole twice, and kept neither time.
    """

    @classmethod
    def of(cls, x_NI: Tensor, tp: TensorParallel, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor:
        """Return Y. X enters the region of `tp`, so that its gradient is summed there."""
        return cls.apply(x_NI, tp, weights, *(weight.seen for weight in weights), *biases)

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, tp: TensorParallel, weights: Sequence[Weight], *tensors: Tensor | None) -> Tensor:
        seen, biases = tensors[: len(weights)], tensors[len(weights) :]
        ctx.tp, ctx.weights, ctx.bias_dtypes = tp, weights, [None if bias is None else bias.dtype for bias in biases]
        ctx.save_for_backward(x_NI, *seen)
        all_NI = all_gather(x_NI, tp.group) if tp.sequence else x_NI
        parts = [
            _linear(all_NI, weight.value(kept, x_NI.dtype), bias)
            for weight, kept, bias in zip(weights, seen, biases, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        weights: Sequence[Weight] = ctx.weights
        x_NI, *seen = ctx.saved_tensors
        values = [weight.value(kept, dy_NO.dtype) for weight, kept in zip(weights, seen, strict=True)]
        parts = dy_NO.split([value.shape[0] for value in values], -1)

        gathering = start_all_gather(x_NI, tp.group) if tp.sequence else Pending(x_NI, None)
        if not tp.overlap:
            gathering.wait()
        dx_NI = product(parts[0], values[0])
        for part, value in zip(parts[1:], values[1:], strict=True):
            add_product(dx_NI, part, value)
        summing = (start_reduce_scatter if tp.sequence else start_all_reduce)(dx_NI, tp.group)
        if not tp.overlap:
            summing.wait()
        all_NI = gathering.wait()
        dws = [weight.gradient(part, all_NI) for weight, part in zip(weights, parts, strict=True)]
        wanted = ctx.needs_input_grad[3 + len(weights) :]
        dbs = [
            part.sum(0).to(dtype) if is_wanted else None
            for part, dtype, is_wanted in zip(parts, ctx.bias_dtypes, wanted, strict=True)
        ]
        return summing.wait(), None, None, *dws, *dbs


def _linear(x_NI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return X Wᵀ + b in the format of x."""
    return linear(x_NI, weight.to(x_NI.dtype), None if bias is None else bias.to(x_NI.dtype))


class _Adaptable(Sharded):
    """A layer that may have something trained beside it, and then weights in few bits."""

    tp: TensorParallel
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
        for name in WEIGHTS:
            if (weight := self.given(name)) is not None:
                self.quantized[name] = QuantizedWeight.of(weight.detach(), self.specs.pop(name), form)
                delattr(self, name)
        self.derive()

    def given(self, name: str) -> nn.Parameter | None:
        """Return a parameter that the layer may have; None if it has not."""
        return getattr(self, name) if name in self.specs else None

    def weights(self) -> list[Weight]:
        """Return the weights of the layer, one or two, in the form in which they are here."""
        every = [self.quantized.get(name) or self.given(name) for name in WEIGHTS]
        held = [weight for weight in every if weight is not None]
        return [PlainWeight(w, self.tp.deferred) if isinstance(w, nn.Parameter) else w for w in held]

    def values(self, name: str) -> Tensor:
        """Return the values of a weight that the layer has; fp32 where it is quantized."""
        return self.quantized[name].dequantized(torch.float32) if name in self.quantized else self.get_parameter(name)

    def forward(self, x_NI: Tensor, streams: Streams | None = None) -> Tensor:
        """Return the output [N, O], with what is beside the layer; `streams`: for its dropout."""
        return self.plain(x_NI) if self.beside is None else self.beside(self, x_NI, streams)

    def derive(self) -> None:
        if self.beside is not None:
            self.beside.start_from(self)

    def plain(self, x_NI: Tensor) -> Tensor:
        """Return the layer's own output [N, O]."""
        raise NotImplementedError


class ColumnParallelLinear(_Adaptable):
    """Y = X Aᵀ + b with the rows of A, the output features, divided: A = [A_1; …; A_p], Y_i = X
    A_iᵀ + b_i.

    Several outputs (q, k, v or gate, up) are fused in one matrix product. Each is divided on its
    own, so a rank's weight is [its rows of q; its rows of k; its rows of v] at any degree that
    divides them. `shared` outputs have fewer parts than there are ranks (key/value heads): the
    ranks of `copies`, neighbours in the group, hold the same part and each computes with it for
    its own consumers, so their gradients are partial.

    Forward: X [N, I] or this rank's tokens of it → Y [N, O/p], the shared outputs last. Backward:
    dX = Σ_i dY_i A_i over the group. Communication with sequence parallelism: an all-gather
    forward, an all-gather and a reduce-scatter backward; without: an all-reduce backward.
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
        """Declare weight and bias of outputs that are cut into one part for each `copies`
        ranks, and return what is here of each."""
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
        """Return the layer's own output [N, O]."""
        if self.tp.group.size == 1 and self.tp.deferred is None and not self.quantized:
            return _linear(x_NI, self.weight, self.given("bias"))
        weights = self.weights()
        biases = (self.given("bias"), self.given("shared_bias"))[: len(weights)]
        return _Linear.of(x_NI, self.tp, weights, biases)


class RowParallelLinear(_Adaptable):
    """Y = X Aᵀ + b with the columns of A, the input features, divided: Y = Σ_i X_i A_iᵀ + b.

    Forward: X_i [N, I/p] → Y [N, O], or this rank's tokens of it; the bias is added once, after
    the sum over the group. Backward: dX_i = dY A_i. Communication: an all-reduce forward; with
    sequence parallelism a reduce-scatter forward and an all-gather backward, and the bias sees
    only this rank's tokens: its gradient is partial.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, name: str, bias: bool, init: Init, transposed: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp = tp
        self.inside = TensorParallel.alone()  # what this rank does with its own features
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
        """Return the layer's own output [N, O]."""
        if self.tp.deferred is None and not self.quantized:
            y_NO = self.tp.leave(_linear(x_NI, self.weight, None))
        else:
            y_NO = self.tp.leave(_Linear.of(x_NI, self.inside, self.weights(), [None]))
        return y_NO if self.bias is None else y_NO + self.bias.to(y_NO.dtype)


class ReplicatedLinear(Sharded):
    """Y = X Aᵀ + b between the parallel regions, whole on every rank; without `bias` Y = X Aᵀ.

    Forward: X [N, I], or this rank's tokens of it → Y [N, O] of the same tokens; no communication.
    With sequence parallelism each rank gives its tokens' part of the gradients; without, all ranks
    compute the same.
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
        """Declare the parameters; `added`: put beside the model's own weights for tuning."""
        super().__init__()
        self.register_parameter("bias", None)
        parameters = [("weight", (out_features, in_features), Role.MATRIX, init), ("bias", (out_features,), Role.BIAS, Init())]
        for what, shape, role, start in parameters[: 1 + bias]:
            spec = whole(f"{name}.{what}", shape, role=role, init=start, copies=tp.group, partial=tp.sequence, added=added)
            self.declare(what, shape, spec)

    def forward(self, x_NI: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_NI.dtype)
        return linear(x_NI, self.weight.to(x_NI.dtype), bias)
