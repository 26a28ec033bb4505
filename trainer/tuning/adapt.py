"""Tuning of a frozen network: parameters are added to its blocks before their storage is
allocated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import nn

from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.loss import VocabParallelHead
from parallel.params import Sharded
from parallel.quantized import QuantizedWeight
from parallel.vocabulary import VocabularyMatrix
from trainer.model.config import TransformerConfig
from trainer.schema import Tuning
from trainer.tuning.builders import Builder, builder_of
from trainer.tuning.methods import method_of
from trainer.tuning.targets import rows_name, targeted_modules

BIASES = ("bias", "shared_bias")  # what our layers and norms call them


def adaptation(tuning: Tuning, config: TransformerConfig) -> Callable[[nn.Module], None]:
    """Return the function that a `Stage` calls with each of its blocks."""
    if tuning.method is None:
        return lambda block: None
    method, builder = method_of(tuning), builder_of(tuning)
    modules = frozenset(targeted_modules(tuning, config))

    def adapt(block: nn.Module) -> None:
        block.requires_grad_(False)
        if config.new_tokens:
            _train_token_rows(block, config.new_tokens)
        if method.trains_biases:
            _thaw_biases(block)
        _put_beside(block, builder, modules, tuning)

    return adapt


def quantizing(fill: Callable[[nn.Module], None], tuning: Tuning) -> Callable[[nn.Module], None]:
    """Return a `fill` after which the linear layers inside attention and MLP have their frozen
    weights in few bits."""
    form = tuning.quantize
    if form is None:
        return fill

    def fill_and_quantize(block: nn.Module) -> None:
        fill(block)
        for layer in block.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                layer.quantize(form)

    return fill_and_quantize


def quantized_weights(module: nn.Module) -> list[QuantizedWeight]:
    """Return all quantized weights, in the order of the model."""
    layers = (layer for layer in module.modules() if isinstance(layer, ColumnParallelLinear | RowParallelLinear))
    return [weight for layer in layers for weight in layer.quantized.values()]


def _train_token_rows(block: nn.Module, tokens: Sequence[int]) -> None:
    """Train the rows of new tokens in the embedding and in the head.

    The head has a matrix of its own, or another copy of the embedding's.
    """
    for matrix in block.modules():
        if isinstance(matrix, VocabParallelHead) and (owner := matrix.tied_to[0]) is not None:
            matrix.share_rows(owner)
        elif isinstance(matrix, VocabularyMatrix):
            matrix.train_rows(tokens, rows_name(matrix.specs["weight"].pieces[0].name))


def _thaw_biases(block: nn.Module) -> None:
    """Train all biases, those of norms too (Ben Zaken et al. 2021, arXiv:2106.10199)."""
    for owner in block.modules():
        if isinstance(owner, Sharded):
            for name in owner.specs.keys() & set(BIASES):
                getattr(owner, name).requires_grad_(True)


def _put_beside(block: nn.Module, builder: Builder, modules: Collection[str], tuning: Tuning) -> None:
    for layer in list(block.modules()):
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            kind = builder.column if isinstance(layer, ColumnParallelLinear) else builder.row
            if kind is not None and not layer.module_names.isdisjoint(modules):
                layer.beside = kind.beside(layer, modules, tuning)
