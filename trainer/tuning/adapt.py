"""Freezing the network and putting what is trained beside it, block by block, before any storage is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from torch import nn

from parallel.bottleneck import Bottleneck
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.loss import VocabParallelHead
from parallel.low_rank import ColumnLowRank, LowRank, RowLowRank
from parallel.params import Sharded
from parallel.quantized import QuantizedWeight
from parallel.rescaling import InputRescaling, OutputRescaling
from parallel.vocabulary import VocabularyMatrix
from trainer.model.config import TransformerConfig
from trainer.schema import Tuning
from trainer.tuning.targets import rows_name, targeted_modules

BIASES = ("bias", "shared_bias")  # what our layers and norms call them


def adaptation(tuning: Tuning, config: TransformerConfig) -> Callable[[nn.Module], None]:
    """What a `Stage` does to each of its blocks."""
    if tuning.method is None:
        return lambda block: None
    modules = frozenset(targeted_modules(tuning, config))

    def adapt(block: nn.Module) -> None:
        block.requires_grad_(False)
        if config.new_tokens:
            _train_token_rows(block, config.new_tokens)
        if tuning.method == "bitfit":
            _thaw_biases(block)
        else:
            _put_beside(block, modules, tuning)

    return adapt


def quantizing(fill: Callable[[nn.Module], None], tuning: Tuning) -> Callable[[nn.Module], None]:
    """A `fill` after which the linear layers inside attention and MLP hold their frozen weights in few bits."""
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
    """All of them, in the order of the model."""
    layers = (layer for layer in module.modules() if isinstance(layer, ColumnParallelLinear | RowParallelLinear))
    return [weight for layer in layers for weight in layer.quantized.values()]


def scale_of(tuning: Tuning) -> float:
    """alpha / r (Hu et al. 2021, arXiv:2106.09685, §4.1), or alpha / √r, with which the learning rate need not change with the
    rank (Kalajdzievski 2023, arXiv:2312.03732). AdaLoRA's r is the one it starts with, with peft's 1e-5 beside it."""
    if tuning.method == "adalora":
        return tuning.alpha / (tuning.rank + 1e-5)
    return tuning.alpha / (math.sqrt(tuning.rank) if tuning.rank_stabilized else tuning.rank)


def _train_token_rows(block: nn.Module, tokens: Sequence[int]) -> None:
    """Of the embedding, and of a head that has a matrix of its own, or another copy of the embedding's."""
    for matrix in block.modules():
        if isinstance(matrix, VocabParallelHead) and (owner := matrix.tied_to[0]) is not None:
            matrix.share_rows(owner)
        elif isinstance(matrix, VocabularyMatrix):
            matrix.train_rows(tokens, rows_name(matrix.specs["weight"].pieces[0].name))


def _thaw_biases(block: nn.Module) -> None:
    """All biases, those of norms too (Ben Zaken et al. 2021, arXiv:2106.10199)."""
    for owner in block.modules():
        if isinstance(owner, Sharded):
            for name in owner.specs.keys() & set(BIASES):
                getattr(owner, name).requires_grad_(True)


def _put_beside(block: nn.Module, modules: Collection[str], tuning: Tuning) -> None:
    for layer in list(block.modules()):
        if isinstance(layer, ColumnParallelLinear):
            if any(shard.output.name in modules for shard in (*layer.local_shards, *layer.shared_shards)):
                layer.adapter = _column(layer, modules, tuning)
        elif isinstance(layer, RowParallelLinear) and layer.name in modules:
            layer.adapter = _row(layer, tuning)


def _column(layer: ColumnParallelLinear, modules: Collection[str], tuning: Tuning) -> ColumnLowRank | OutputRescaling:
    if tuning.method == "ia3":
        return OutputRescaling(layer, modules)
    return ColumnLowRank(layer, modules, _low_rank(tuning))


def _row(layer: RowParallelLinear, tuning: Tuning) -> RowLowRank | InputRescaling | Bottleneck:
    if tuning.method == "ia3":
        return InputRescaling(layer)
    if tuning.method == "adapter":
        return Bottleneck(layer, tuning.bottleneck)
    return RowLowRank(layer, _low_rank(tuning))


def _low_rank(tuning: Tuning) -> LowRank:
    return LowRank(
        tuning.rank,
        scale_of(tuning),
        tuning.dropout,
        magnitude=tuning.method == "dora",
        singular_values=tuning.method == "adalora",
    )
