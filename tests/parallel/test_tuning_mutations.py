"""The parity check of tuning can fail: mistakes that are easily made, switched on one by one, must each be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from parallel import low_rank, params, quantized
from parallel.bottleneck import Bottleneck
from parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from parallel.low_rank import ColumnLowRank, LowRank, RowLowRank
from parallel.mesh import Mesh
from parallel.params import ShardSpec
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.parallel.training import Case, Outcome, assert_same_training, in_one_process, outcome, run_case
from tests.parallel.tuning import LORA, METHODS
from tests.spawn import spawn
from trainer.engine.zero_state import ZeroState
from trainer.tuning import builders, rank_budget
from trainer.tuning.rank_budget import RankAllocator
from trainer.tuning.targets import is_added


def whole_factors_left_partial() -> None:
    """Under sequence parallelism each rank trains the whole factors on its own tokens."""
    for adapter in (ColumnLowRank, RowLowRank):
        declare = adapter.declare

        def unsummed(self: nn.Module, name: str, shape: Any, spec: ShardSpec, declare: Any = declare) -> None:
            declare(self, name, shape, replace(spec, partial=False))

        adapter.declare = unsummed


def every_rank_takes_the_first_columns() -> None:
    """A row-parallel layer's A is cut at the same place on all ranks."""
    row = RowLowRank.__init__

    def first(self: RowLowRank, layer: Any, keys: Any) -> None:
        row(self, layer, keys)
        spec = self.specs["lora_A"]
        self.specs["lora_A"] = replace(spec, pieces=tuple(replace(piece, start=(0, 0)) for piece in spec.pieces))

    RowLowRank.__init__ = first


def row_products_not_summed() -> None:
    """B of a row-parallel layer gets what this rank's features give, though it is whole on every rank."""
    forward = RowLowRank.forward

    def local(self: RowLowRank, *args: Any) -> torch.Tensor:
        leave = TensorParallel.leave
        TensorParallel.leave = lambda tp, y: leave(tp, y) / (tp.group.size if y.shape[-1] == self.keys.rank else 1)
        try:
            return forward(self, *args)
        finally:
            TensorParallel.leave = leave

    RowLowRank.forward = local


def scaling_forgotten() -> None:
    builders.LowRank = lambda rank, scale, *more, **parts: LowRank(rank, 1.0, *more, **parts)


def drawn_by_rank() -> None:
    """Each rank draws the whole factor for itself."""
    draw = params.draw
    params.draw = lambda name, *more: draw(f"{name}/{torch.distributed.get_rank()}" if is_added(name) else name, *more)


def whole_factors_counted_on_every_rank() -> None:
    ShardSpec.owned = property(lambda spec: spec.added or spec.copies.rank == 0)


def base_trained_too() -> None:
    nn.Module.requires_grad_ = lambda module, requires_grad=True: module


def one_factor_for_q_k_and_v() -> None:
    """The fused projection gets one A, as if it were one module."""
    build = ColumnLowRank.__init__

    def fused(self: ColumnLowRank, layer: ColumnParallelLinear, modules: Any, keys: Any) -> None:
        build(self, layer, modules, keys)
        self.module_of = [None if module is None else 0 for module in self.module_of]

    ColumnLowRank.__init__ = fused


def masks_of_the_first_features() -> None:
    """A row-parallel layer's ranks all drop as the first one does."""
    build = RowLowRank.__init__

    def as_the_first(self: RowLowRank, *args: Any) -> None:
        build(self, *args)
        features = self.drop.features
        self.drop = replace(self.drop, features=slice(0, features.stop - features.start))

    RowLowRank.__init__ = as_the_first


def norms_of_own_columns() -> None:
    """DoRA's norm of a row-parallel layer's rows leaves out what other ranks hold of them."""
    low_rank.all_reduce = lambda tensor, group: tensor


def norms_with_gradients() -> None:
    """DoRA's norm is not taken for a constant."""
    low_rank._row_squares = low_rank._row_squares.__wrapped__


def bottlenecks_left_partial() -> None:
    """Under sequence parallelism each rank trains the adapters on its own tokens."""
    declare = ReplicatedLinear.declare

    def unsummed(self: ReplicatedLinear, name: str, shape: Any, spec: ShardSpec) -> None:
        declare(self, name, shape, replace(spec, partial=False))

    ReplicatedLinear.declare = unsummed


def bottlenecks_inside_the_region() -> None:
    """The adapter changes what each rank gives to the sum, not the sum."""

    def inside(self: Bottleneck, layer: Any, x_NI: torch.Tensor, streams: Any) -> torch.Tensor:
        part = functional.linear(x_NI, layer.weight)
        return layer.tp.leave(part + self.up(functional.gelu(self.down(part))))

    Bottleneck.forward = inside


def importance_of_own_parts() -> None:
    """Each rank judges triplets by its own part of their rows and columns."""
    RankAllocator._scores = partialmethod(_with_own_sums, RankAllocator._scores)


def orthogonality_of_own_parts() -> None:
    """Each rank pulls its own part of the directions towards orthogonality."""
    RankAllocator.begin = partialmethod(_with_own_sums, RankAllocator.begin)


def _with_own_sums(self: RankAllocator, method: Callable[..., Any], *args: Any) -> Any:
    summed, rank_budget.all_reduce = rank_budget.all_reduce, lambda tensor, group: tensor
    try:
        return method(self, *args)
    finally:
        rank_budget.all_reduce = summed


def blocks_of_outputs() -> None:
    """Neighbours along the outputs share a magnitude."""
    along, whole = quantized.quantize, quantized.dequantize
    quantized.quantize = lambda weight_OI, form: along(weight_OI.t().contiguous(), form)
    quantized.dequantize = lambda *stored: whole(*stored).t()


def magnitudes_of_the_first_blocks() -> None:
    """Of a row-parallel layer every rank takes the same magnitudes, not those of its own codes."""
    build = RowParallelLinear.quantize

    def first(self: RowParallelLinear, form: str) -> None:
        build(self, form)
        (weight,) = self.quantized.values()
        torch.distributed.broadcast(weight.magnitudes, src=0)

    RowParallelLinear.quantize = first


def nothing_is_cleared() -> None:
    """Ranks are shared out, and the weights do not hear of it."""
    ZeroState.clear = lambda self, kept: None


MUTATIONS_OF = {
    "adalora": [importance_of_own_parts, orthogonality_of_own_parts, nothing_is_cleared, whole_factors_left_partial],
    "dora": [norms_of_own_columns, norms_with_gradients, whole_factors_left_partial],
    "qlora": [blocks_of_outputs, magnitudes_of_the_first_blocks],
    "adapter": [bottlenecks_left_partial, bottlenecks_inside_the_region, drawn_by_rank, whole_factors_counted_on_every_rank],
}
MUTATIONS = [
    whole_factors_left_partial,
    every_rank_takes_the_first_columns,
    row_products_not_summed,
    scaling_forgotten,
    drawn_by_rank,
    whole_factors_counted_on_every_rank,
    base_trained_too,
    one_factor_for_q_k_and_v,
    masks_of_the_first_features,
]
MUTATED = Case(tuning={**LORA, "dropout": 0.1}, clip_norm=0.05, steps=4)


def mutated(mesh: Mesh, mutate: Callable[[], None], case: Case) -> Outcome:
    mutate()
    return run_case(mesh, case)


@pytest.fixture(scope="module")
def honest() -> Outcome:
    return outcome(MUTATED)


def test_without_a_mutation_nothing_is_caught(honest: Outcome) -> None:
    for sequence in (False, True):
        got = outcome(replace(MUTATED, tp=2, stage=1, sequence_parallel=sequence))
        assert_same_training(got, honest, relative=2e-6, weights=1e-6)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_parity_check_catches(mutate: Callable[[], None], honest: Outcome) -> None:
    got = spawn(mutated, Layout(tp=2), mutate, replace(MUTATED, tp=2, stage=1))[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, honest, relative=2e-6, weights=1e-6)


@pytest.mark.parametrize(
    ("method", "mutate"),
    [(method, mutate) for method, mutations in MUTATIONS_OF.items() for mutate in mutations],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_parity_check_catches_in(method: str, mutate: Callable[[], None]) -> None:
    case = replace(METHODS[method], tp=2, stage=1)
    got = spawn(mutated, Layout(tp=2), mutate, case)[0]
    with pytest.raises(AssertionError):
        assert_same_training(got, in_one_process(METHODS[method]), relative=2e-6, weights=1e-6)
