"""The layers of a network, as its config describes them, from the layers of `parallel/`.

Shape letters: B batch, S sequence, N = B · S tokens (with sequence parallelism this rank's share of
them), D model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.attention import ParallelAttention, Rotation
from parallel.cross_attention import ParallelCrossAttention
from parallel.documents import Documents
from parallel.embedding import VocabParallelEmbedding
from parallel.mesh import Group
from parallel.mlp import ParallelMLP
from parallel.norm import QueryKeyNorm
from parallel.params import Init
from parallel.rng import Streams
from parallel.tensor import TensorParallel
from trainer.model.config import TransformerConfig
from trainer.model.embedding import Embedding
from trainer.model.encoder_decoder import SourceAndTargetEmbedding, SourceLayer, TargetLayer
from trainer.model.names import WeightNames, names_of
from trainer.model.pieces import Dropout, final_dropout, make_norm, matrix_init
from trainer.model.position_tables import PositionTables

# the encoder's output for the sources [N, D], and their boundaries
Source = tuple[Tensor, Documents]


def make_embedding(
    config: TransformerConfig, *, dtype: torch.dtype, tp: TensorParallel, tied_over: Group | None
) -> Embedding | SourceAndTargetEmbedding:
    names, init, D = names_of(config), Init(std=config.init_std), config.hidden_size
    tokens = VocabParallelEmbedding(config.vocab_size, D, name=names.embedding, init=init, tp=tp, tied_over=tied_over)
    embedding = Embedding(config, tokens, site=names.embedding, dtype=dtype)
    if names.encoder is None:
        return embedding
    of_source, name = config.source_vocab_size, names.source_embedding
    if of_source is None or name is None:
        of_source, name, tied_to = config.vocab_size, names.embedding, tokens
    else:
        tied_to = None
    sources = VocabParallelEmbedding(of_source, D, name=name, init=init, tp=tp, tied_to=tied_to)
    return SourceAndTargetEmbedding(Embedding(config, sources, site=f"{name}/source", dtype=dtype), embedding)


class CrossAttention(nn.Module):
    """The attention to the source, norm(x + attention(norm(x), source)); [N, D] → [N, D]."""

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        names: WeightNames,
        norm: Callable[[str | None], nn.Module],
        *,
        recompute_core: bool,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        query, key_value = names.cross_attention(config, number)
        out = names.cross_out.format(layer=number)
        self.norm = norm(names.cross_norm)
        self.attention = ParallelCrossAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query=query,
            key_value=key_value,
            out=out,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            transposed=names.transposed,
            dropout=config.attention_dropout,
            scale=config.query_scalar**-0.5,
            init=matrix_init(config, config.hidden_size),
            out_init=matrix_init(config, config.num_heads * config.head_dim, into_residual=True),
            recompute=recompute_core,
            tp=tp,
        )
        self.dropout = Dropout(config.residual_dropout, out, tp)
        self.residual_norm = norm(names.cross_residual_norm)

    def forward(self, x_ND: Tensor, documents: Documents, source: Source, streams: Streams | None) -> Tensor:
        attended = self.attention(self.norm(x_ND), documents, *source, streams)
        y_ND: Tensor = self.residual_norm(x_ND + self.dropout(attended, documents, streams))
        return y_ND


class Layer(nn.Module):
    """A layer: norm(x + norm(attention(norm(x)))), then norm(x + norm(mlp(norm(x)))); [N, D] → [N,
    D]. A layer that writes a target attends to its source between the two.

    A family has some of the norms, as its names say: most have the innermost (pre), Gemma 2 the two
    inner ones (sandwich), Bert the outermost (post).
    """

    def __init__(
        self,
        config: TransformerConfig,
        index: int,
        *,
        recompute_core: bool,
        tp: TensorParallel,
        kv_copies: Group,
        tables: PositionTables,
    ) -> None:
        super().__init__()
        names, number = names_of(config).of_layer(config, index)
        init = matrix_init(config, config.hidden_size)
        query, key, value = names.query_key_value(config, number)
        attention_out, mlp_out = names.attention_out.format(layer=number), names.mlp_out.format(layer=number)

        def norm(name: str | None) -> nn.Module:
            return make_norm(config, name and name.format(layer=number), tp)

        self.attention_norm = norm(names.attention_norm)
        self.attention = ParallelAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query=query,
            key=key,
            value=value,
            out=attention_out,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            transposed=names.transposed,
            dropout=config.attention_dropout,
            causal=config.causal and index >= config.encoder_layers,
            window=config.windows[index],
            scale=config.query_scalar**-0.5,
            softcap=config.attention_softcap,
            qk_norm=_qk_norm(config, index, tp),
            relative_bias=tables.of_layer(config, index, init, tp),
            init=init,
            out_init=matrix_init(config, config.num_heads * config.head_dim, into_residual=True),
            recompute=recompute_core,
            share_calls=bool(config.encoder_layers),  # sentences
            tp=tp,
            kv_copies=kv_copies,
        )
        self.attention_post_norm = norm(names.attention_post_norm)
        self.attention_dropout = Dropout(config.residual_dropout, attention_out, tp)
        self.attention_residual_norm = norm(names.attention_residual_norm)
        self.cross = None
        if names.encoder is not None:
            self.cross = CrossAttention(config, number, names, norm, recompute_core=recompute_core, tp=tp)
        self.mlp_norm = norm(names.mlp_norm)
        self.mlp = ParallelMLP(
            hidden_size=config.hidden_size,
            ffn_size=config.ffn_size,
            activation=config.activation,
            inputs=names.mlp_inputs(config, number),
            out=mlp_out,
            bias=config.mlp_bias,
            transposed=names.transposed,
            dropout=config.mlp_dropout,
            init=init,
            out_init=matrix_init(config, config.ffn_size, into_residual=True),
            tp=tp,
        )
        self.mlp_post_norm = norm(names.mlp_post_norm)
        self.mlp_dropout = Dropout(config.residual_dropout, mlp_out, tp)
        self.mlp_residual_norm = norm(names.mlp_residual_norm)

    def forward(
        self,
        x_ND: Tensor,
        documents: Documents,
        rotation: Rotation | None,
        streams: Streams | None,
        source: Source | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x_ND), documents, rotation, streams)
        attended = self.attention_dropout(self.attention_post_norm(attended), documents, streams)
        x_ND = self.attention_residual_norm(x_ND + attended)
        if self.cross is not None and source is not None:
            x_ND = self.cross(x_ND, documents, source, streams)
        fed_forward = self.mlp(self.mlp_norm(x_ND), streams)
        fed_forward = self.mlp_dropout(self.mlp_post_norm(fed_forward), documents, streams)
        y_ND: Tensor = self.mlp_residual_norm(x_ND + fed_forward)
        return y_ND


def make_layer(
    config: TransformerConfig,
    index: int,
    *,
    recompute_core: bool,
    tp: TensorParallel,
    kv_copies: Group,
    tables: PositionTables,
) -> Layer | SourceLayer | TargetLayer:
    layer = Layer(config, index, recompute_core=recompute_core, tp=tp, kv_copies=kv_copies, tables=tables)
    encoder = names_of(config).encoder
    if encoder is None:
        return layer
    if index >= config.encoder_layers:
        return TargetLayer(layer)
    ends = index == config.encoder_layers - 1
    norm = make_norm(config, encoder.final_norm if ends else None, tp)
    return SourceLayer(layer, norm, final_dropout(config, encoder, tp) if ends else None)


def _qk_norm(config: TransformerConfig, index: int, tp: TensorParallel) -> QueryKeyNorm | None:
    names = names_of(config)
    if names.query_norm is None or names.key_norm is None:
        return None
    query, key = names.query_norm.format(layer=index), names.key_norm.format(layer=index)
    return QueryKeyNorm(config.head_dim, eps=config.norm_eps, query=query, key=key, tp=tp)
