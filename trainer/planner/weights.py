"""The weights of a rank, by their sizes: those that `trainer/model` and `parallel/` would declare,
without building them. No torch.

Shape letters: D model, H heads, G key/value heads, K head dim, F ffn, V vocabulary, T tensor
degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.model.names import WeightNames, names_of, position_table
from trainer.schema import Tuning
from trainer.tuning.methods import method_of
from trainer.tuning.sizes import Outputs, Part
from trainer.tuning.targets import QUANTIZED_TOGETHER, modules_by_role, targeted_modules

# The bytes of a weight's element in few bits, without the fp32 magnitude of each block of them.
QUANTIZED_BYTES = {"nf4": 0.5, "int8": 1.0}
FP32_BYTES = 4


@dataclass(frozen=True)
class Weight:
    """A weight on one rank. `is_matrix`: it decays, and is in a group with others that do.
    `quantized`: the format of a weight that torch does not know as a parameter."""

    shape: tuple[int, ...]
    is_matrix: bool = True
    trained: bool = True
    quantized: str | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized_bytes(self) -> int:
        """The bytes of codes and magnitudes."""
        assert self.quantized is not None
        magnitudes = FP32_BYTES * self.elements // QUANTIZED_TOGETHER
        return int(self.elements * QUANTIZED_BYTES[self.quantized]) + magnitudes


@dataclass(frozen=True)
class Held:
    """The tied weights that a rank has already, so that a block does not have them again."""

    embedding: bool = False
    tables: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """The weights of blocks on each rank of a tensor group, which all have as many."""

    network: TransformerConfig
    tensor: int
    tuning: Tuning = field(default_factory=Tuning)

    def of_stages(self, stages: Mapping[int, Sequence[Block]]) -> list[Weight]:
        """Return the weights of a rank with these stages of the model, in the order in which they
        are built."""
        found: list[Weight] = []
        held = Held()
        for _, blocks in sorted(stages.items()):
            for block in blocks:
                found += self.of_block(block, held)
                held = self._after(block, held)
        return found

    def of_block(self, block: Block, held: Held = Held()) -> list[Weight]:
        match block.kind:
            case "embedding":
                return self._embedding
            case "layer":
                table = position_table(self.network, block.layer)
                return self._layer(block.layer, has_table=table is not None and table not in held.tables)
            case "head":
                return self._label_head if self.network.classes else self._head(held)

    def _after(self, block: Block, held: Held) -> Held:
        table = position_table(self.network, block.layer) if block.kind == "layer" else None
        if table is not None:
            return replace(held, tables=held.tables | {table})
        return replace(held, embedding=True) if block.kind == "embedding" else held

    # ------------------------------------------------------------------------ blocks

    @cached_property
    def _embedding(self) -> list[Weight]:
        network, names = self.network, names_of(self.network)
        D = network.hidden_size
        found = self._vocabulary(network.vocab_size, is_matrix=False)
        tables = [self._model((network.max_positions, D), is_matrix=False)] * (names.positions is not None)
        tables += [self._model((network.token_types, D), is_matrix=False)] * (names.token_types is not None)
        tables += self._norm(names.embedding_norm)
        found += tables
        if names.encoder is not None:  # the source's embedding, whose matrix is the same or its own
            if network.source_vocab_size is not None and names.source_embedding is not None:
                found += self._vocabulary(network.source_vocab_size, is_matrix=False)
            found += tables
        return found

    def _layer(self, index: int, *, has_table: bool) -> list[Weight]:
        key = (index < self.network.encoder_layers, index == self.network.encoder_layers - 1, has_table)
        if key not in self._layers:
            self._layers[key] = self._built_layer(index, has_table=has_table)
        return self._layers[key]

    @cached_property
    def _layers(self) -> dict[tuple[bool, bool, bool], list[Weight]]:
        return {}

    def _built_layer(self, index: int, *, has_table: bool) -> list[Weight]:
        network = self.network
        names, _ = names_of(network).of_layer(network, index)
        found = [*self._norm(names.attention_norm), *self._attention(names, index, has_table=has_table)]
        found += [*self._norm(names.attention_post_norm), *self._norm(names.attention_residual_norm)]
        if names_of(network).encoder is not None and index >= network.encoder_layers:
            found += self._cross_attention(names)
        found += [*self._norm(names.mlp_norm), *self._mlp(index)]
        found += [*self._norm(names.mlp_post_norm), *self._norm(names.mlp_residual_norm)]
        ends_encoder = names_of(network).encoder is not None and index == network.encoder_layers - 1
        return found + (self._norm(names.final_norm) if ends_encoder else [])

    def _attention(self, names: WeightNames, index: int, *, has_table: bool) -> list[Weight]:
        network, T = self.network, self.tensor
        D, K, H = network.hidden_size, network.head_dim, network.num_heads
        modules = modules_by_role(network, index)
        norms = [self._model((K,), is_matrix=False)] * 2 if names.query_norm is not None else []
        table = [self._model((network.relative_buckets, H // T), is_matrix=False)] * has_table
        # With fewer key/value heads than ranks, neighbours have the same one.
        G = max(1, network.num_kv_heads // T)
        query, key_value = [(modules["q"], H // T * K)], [(modules["k"], G * K), (modules["v"], G * K)]
        is_shared = network.num_kv_heads < T
        own, shared = (query, key_value) if is_shared else ([*query, *key_value], [])
        qkv = self._column(D, own, shared, bias=network.qkv_bias)
        return [*norms, *table, *qkv, *self._row(modules["o"], H // T * K, bias=network.attention_out_bias)]

    def _cross_attention(self, names: WeightNames) -> list[Weight]:
        network, T = self.network, self.tensor
        D, K = network.hidden_size, network.head_dim
        query, key_value = network.num_heads // T * K, 2 * network.num_kv_heads // T * K
        return [
            *self._norm(names.cross_norm),
            *self._column(D, [("", query)], [], bias=network.qkv_bias),
            *self._column(D, [("", key_value)], [], bias=network.qkv_bias),
            *self._row("", query, bias=network.attention_out_bias),
            *self._norm(names.cross_residual_norm),
        ]

    def _mlp(self, index: int) -> list[Weight]:
        network, modules = self.network, modules_by_role(self.network, index)
        F = network.ffn_size // self.tensor
        inputs = [(modules[role], F) for role in ("gate", "up") if role in modules]
        up = self._column(network.hidden_size, inputs, [], bias=network.mlp_bias)
        return [*up, *self._row(modules["down"], F, bias=network.mlp_bias)]

    def _head(self, held: Held) -> list[Weight]:
        network, names = self.network, names_of(self.network)
        D = network.hidden_size
        found = self._norm(names.final_norm)
        if names.head_transform is not None:
            found += [self._bias(D), self._model((D, D)), *self._norm(names.head_transform_norm)]
        is_tied = network.ties_head and held.embedding
        # A copy of the embedding on another rank is an embedding too.
        matrix = [] if is_tied else self._vocabulary(network.vocab_size, is_matrix=not network.ties_head)
        if names.head_bias is not None:
            rows = -(-network.vocab_size // self.tensor)
            matrix.insert(min(1, len(matrix)), self._bias(rows, *([1] * names.head_bias_is_row)))
        return found + matrix

    @cached_property
    def _label_head(self) -> list[Weight]:
        network, names = self.network, names_of(self.network)
        D, C = network.hidden_size, len(network.classes)
        found = self._norm(names.final_norm)
        pools = names.pooler is not None
        found += [self._bias(D), self._model((D, D))] * pools
        return [*found, *([self._bias(C)] * pools), self._model((C, D))]

    # ------------------------------------------------------------------------ layers

    def _vocabulary(self, size: int, *, is_matrix: bool) -> list[Weight]:
        """Return this rank's rows, padding included, and rows of new tokens that are trained alone:
        as many as the rank with the most of them has."""
        rows, D = -(-size // self.tensor), self.network.hidden_size
        matrix = self._model((rows, D), is_matrix=is_matrix)
        if self.tuning.method is None or not self.network.new_tokens:
            return [matrix]
        of_ranks = [token // rows for token in self.network.new_tokens]
        most = max(of_ranks.count(rank) for rank in set(of_ranks))
        return [matrix, Weight((most, D), is_matrix=False)]

    def _norm(self, name: str | None) -> list[Weight]:
        if name is None:
            return []
        D, has_bias = self.network.hidden_size, self.network.norm == "layernorm" and self.network.norm_bias
        return [self._model((D,), is_matrix=False), *([self._bias(D)] * has_bias)]

    def _column(
        self, inputs: int, own: Sequence[tuple[str, int]], shared: Sequence[tuple[str, int]], *, bias: bool
    ) -> list[Weight]:
        found = []
        for outputs in filter(None, (own, shared)):
            rows = sum(features for _, features in outputs)
            found += [self._model((rows, inputs), in_layer=True), *([self._bias(rows)] * bias)]
        beside = method_of(self.tuning).beside_column
        adapted = Outputs(*([o for o in outputs if o[0] in self._adapted] for outputs in (own, shared)))
        if beside is None or not adapted.modules:
            return found
        return found + _added(beside(self.tuning, inputs, adapted))

    def _row(self, module: str, inputs: int, *, bias: bool) -> list[Weight]:
        D = self.network.hidden_size
        found = [self._model((D, inputs), in_layer=True), *([self._bias(D)] * bias)]
        beside = method_of(self.tuning).beside_row
        if beside is None or module not in self._adapted:
            return found
        return found + _added(beside(self.tuning, inputs, D))

    @cached_property
    def _adapted(self) -> frozenset[str]:
        return frozenset() if self.tuning.method is None else frozenset(targeted_modules(self.tuning, self.network))

    def _model(self, shape: tuple[int, ...], *, is_matrix: bool = True, in_layer: bool = False) -> Weight:
        """Return one of the model's own weights, which tuning freezes. `in_layer`: of a linear
        layer that tuning may quantize."""
        quantized = self.tuning.quantize if in_layer else None
        return Weight(shape, is_matrix, self.tuning.method is None, quantized)

    def _bias(self, *shape: int) -> Weight:
        trained = self.tuning.method is None or method_of(self.tuning).trains_biases
        return Weight(shape, is_matrix=False, trained=trained)


def _added(parts: Iterable[Part]) -> list[Weight]:
    return [Weight(part.shape, part.is_matrix) for part in parts]
