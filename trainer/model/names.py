"""The names of the weights in a family's Hugging Face checkpoints: one table per family.

To add a family, write the translation of its config in `families.py` and its names here. No torch,
so that `check` can name modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from parallel.outputs import Output
from trainer.model.config import TransformerConfig

if TYPE_CHECKING:
    from parallel.params import ShardSpec
    from parallel.pieces import Piece


@dataclass(frozen=True)
class WeightNames:
    """Names in a Hugging Face checkpoint; those of a layer contain `{layer}`.

    `qkv`: one module that has queries, keys and values in this order, or three. `mlp_in`: the same
    for [up] or [gate, up]. `transposed`: linear weights are stored [in, out]. Names that may be
    None exist in some families only. Norms can be in three positions around attention and MLP:
    before them, after them, and after the sum with their input.

    `position_bias`: the table that all layers of a stack add to the logits of their attention.

    `cross_*`: the attention of a target to its source. `encoder`: the names of the layers that read
    the source, numbered from 0 again; the names here are then those of the layers that write the
    target.

    `head_bias_is_row`: it is stored as [1, V]. `classifier`: the head over classes; `pooler`: the
    layer before it.

    `second_names`: further names under which a folder may have a weight again, beside that of a
    tied head. `other_heads`: the beginnings of the names of weights for heads, or other parts, that
    no network here has.
    """

    embedding: str
    qkv: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    head: str
    classifier: str = "score"
    pooler: str | None = None
    transposed: bool = False
    source_embedding: str | None = None
    positions: str | None = None
    token_types: str | None = None
    embedding_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    attention_norm: str | None = None
    attention_post_norm: str | None = None
    attention_residual_norm: str | None = None
    position_bias: str | None = None
    cross_query: str = ""
    cross_key_value: tuple[str, ...] = ()
    cross_out: str = ""
    cross_norm: str | None = None
    cross_residual_norm: str | None = None
    mlp_norm: str | None = None
    mlp_post_norm: str | None = None
    mlp_residual_norm: str | None = None
    final_norm: str | None = None
    head_transform: str | None = None
    head_transform_norm: str | None = None
    head_bias: str | None = None
    head_bias_is_row: bool = False
    encoder: WeightNames | None = None
    second_names: Mapping[str, str] = field(default_factory=dict)
    other_heads: tuple[str, ...] = ()

    def of_layer(self, config: TransformerConfig, index: int) -> tuple[WeightNames, int]:
        """Return the names of a layer's stack, and the layer's number in it."""
        if self.encoder is not None and index < config.encoder_layers:
            return self.encoder, index
        return self, index - config.encoder_layers

    def cross_attention(self, config: TransformerConfig, layer: int) -> tuple[Output, list[Output]]:
        """Return the projection of the target, and those of the source: key and value."""
        K = config.head_dim
        (query,) = _outputs((self.cross_query,), (config.num_heads * K,), layer)
        return _as_queries(config, query), _outputs(self.cross_key_value, (config.num_kv_heads * K,) * 2, layer)

    def query_key_value(self, config: TransformerConfig, layer: int) -> tuple[Output, Output, Output]:
        """Return the three outputs of the fused projection, with their boxes of the checkpoint."""
        K = config.head_dim
        q, k, v = _outputs(self.qkv, (config.num_heads * K, config.num_kv_heads * K, config.num_kv_heads * K), layer)
        return _as_queries(config, q), k, v

    def mlp_inputs(self, config: TransformerConfig, layer: int) -> list[Output]:
        """Return the outputs [up] or [gate, up]."""
        return _outputs(self.mlp_in, (config.ffn_size,) * (2 if config.gated_mlp else 1), layer)

    def ties(self, specs: Iterable[ShardSpec]) -> dict[str, Piece]:
        """Return the weights of the whole model that a folder may have again, by their further
        names."""
        pieces = {piece.name: piece for spec in specs for piece in spec.pieces}
        others = {self.head: self.embedding, **self.second_names}
        return {name: pieces[of] for name, of in others.items() if of in pieces}

    def is_of_classes(self, name: str) -> bool:
        """Return whether a weight belongs to the head over classes."""
        return name.startswith(tuple(f"{module}." for module in (self.classifier, self.pooler) if module))

    def is_for_other_heads(self, config: TransformerConfig, name: str) -> bool:
        """Return whether a folder's weight is for a head that this network does not have."""
        if config.classes:
            return name.startswith((*self.other_heads, *OVER_VOCABULARY)) and not self.is_of_classes(name)
        return name.startswith(self.other_heads) or self.is_of_classes(name)


def _outputs(names: tuple[str, ...], features: tuple[int, ...], layer: int) -> list[Output]:
    """Return an output for each of `features`: a module of its own, or the next features of the one
    module that has all."""
    modules = [name.format(layer=layer) for name in names]
    if len(modules) == len(features):
        return [Output(module, n) for module, n in zip(modules, features, strict=True)]
    (module,) = modules
    starts = itertools.accumulate(features, initial=0)
    return [Output(module, n, at, sum(features)) for n, at in zip(features, starts, strict=False)]


def _as_queries(config: TransformerConfig, output: Output) -> Output:
    """Return the output of the queries. Their weights start smaller where nothing divides the
    logits of attention."""
    return replace(output, gain=config.head_dim**-0.5) if config.fan_in_init else output


OVER_VOCABULARY = ("lm_head.", "cls.")  # the beginnings of the names of heads over the vocabulary

GPT2 = WeightNames(
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
    attention_norm="transformer.h.{layer}.ln_1",
    qkv=("transformer.h.{layer}.attn.c_attn",),
    attention_out="transformer.h.{layer}.attn.c_proj",
    mlp_norm="transformer.h.{layer}.ln_2",
    mlp_in=("transformer.h.{layer}.mlp.c_fc",),
    mlp_out="transformer.h.{layer}.mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head.weight",
    transposed=True,
)
LLAMA = WeightNames(
    embedding="model.embed_tokens.weight",
    attention_norm="model.layers.{layer}.input_layernorm",
    qkv=tuple(f"model.layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"),
    attention_out="model.layers.{layer}.self_attn.o_proj",
    mlp_norm="model.layers.{layer}.post_attention_layernorm",
    mlp_in=("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    mlp_out="model.layers.{layer}.mlp.down_proj",
    final_norm="model.norm",
    head="lm_head.weight",
)
BERT = WeightNames(
    embedding="bert.embeddings.word_embeddings.weight",
    positions="bert.embeddings.position_embeddings.weight",
    token_types="bert.embeddings.token_type_embeddings.weight",
    embedding_norm="bert.embeddings.LayerNorm",
    qkv=tuple(f"bert.encoder.layer.{{layer}}.attention.self.{x}" for x in ("query", "key", "value")),
    attention_out="bert.encoder.layer.{layer}.attention.output.dense",
    attention_residual_norm="bert.encoder.layer.{layer}.attention.output.LayerNorm",
    mlp_in=("bert.encoder.layer.{layer}.intermediate.dense",),
    mlp_out="bert.encoder.layer.{layer}.output.dense",
    mlp_residual_norm="bert.encoder.layer.{layer}.output.LayerNorm",
    head_transform="cls.predictions.transform.dense",
    head_transform_norm="cls.predictions.transform.LayerNorm",
    head="cls.predictions.decoder.weight",
    head_bias="cls.predictions.bias",
    classifier="classifier",
    pooler="bert.pooler.dense",
    second_names={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    # The original training also asked whether one sentence follows another (Devlin et al. 2018,
    # §3.1). Its folders have that head and the pooler before it, which no masked-language model
    # reads; transformers' BertForMaskedLM drops them too.
    other_heads=("pooler.", "cls.seq_relationship."),
)


def _marian_side(side: str) -> WeightNames:
    """Return the names that Marian's encoder and decoder have in common."""
    layer = f"model.{side}.layers.{{layer}}"
    return WeightNames(
        embedding="model.shared.weight",
        qkv=tuple(f"{layer}.self_attn.{x}_proj" for x in "qkv"),
        attention_out=f"{layer}.self_attn.out_proj",
        attention_residual_norm=f"{layer}.self_attn_layer_norm",
        mlp_in=(f"{layer}.fc1",),
        mlp_out=f"{layer}.fc2",
        mlp_residual_norm=f"{layer}.final_layer_norm",
        head="lm_head.weight",
    )


MARIAN = replace(
    _marian_side("decoder"),
    encoder=_marian_side("encoder"),
    cross_query="model.decoder.layers.{layer}.encoder_attn.q_proj",
    cross_key_value=tuple(f"model.decoder.layers.{{layer}}.encoder_attn.{x}_proj" for x in "kv"),
    cross_out="model.decoder.layers.{layer}.encoder_attn.out_proj",
    cross_residual_norm="model.decoder.layers.{layer}.encoder_attn_layer_norm",
    head_bias="final_logits_bias",
    head_bias_is_row=True,
    second_names={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
)


def _t5_side(side: str, *, mlp: int) -> WeightNames:
    """Return the names that T5's encoder and decoder have in common. `mlp`: the number of the MLP
    among the parts of a block."""
    block = f"{side}.block.{{layer}}.layer"
    return WeightNames(
        embedding="shared.weight",
        attention_norm=f"{block}.0.layer_norm",
        qkv=tuple(f"{block}.0.SelfAttention.{x}" for x in "qkv"),
        attention_out=f"{block}.0.SelfAttention.o",
        position_bias=f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        mlp_norm=f"{block}.{mlp}.layer_norm",
        mlp_in=(f"{block}.{mlp}.DenseReluDense.wi",),
        mlp_out=f"{block}.{mlp}.DenseReluDense.wo",
        final_norm=f"{side}.final_layer_norm",
        head="lm_head.weight",
    )


def _gated(names: WeightNames) -> WeightNames:
    (single,) = names.mlp_in
    return replace(names, mlp_in=(f"{single}_0", f"{single}_1"))


T5 = replace(
    _t5_side("decoder", mlp=2),
    encoder=_t5_side("encoder", mlp=1),
    cross_norm="decoder.block.{layer}.layer.1.layer_norm",
    cross_query="decoder.block.{layer}.layer.1.EncDecAttention.q",
    cross_key_value=tuple(f"decoder.block.{{layer}}.layer.1.EncDecAttention.{x}" for x in "kv"),
    cross_out="decoder.block.{layer}.layer.1.EncDecAttention.o",
    second_names={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
    # The first checkpoints have a table for attention to the source, which no model reads.
    other_heads=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",),
)
_T5_GATED = replace(_gated(T5), encoder=_gated(_t5_side("encoder", mlp=1)))

# The embedding of each side has its own weight; the head has the target's.
_SEPARATE = {
    "marian": replace(
        MARIAN,
        embedding="model.decoder.embed_tokens.weight",
        source_embedding="model.encoder.embed_tokens.weight",
        second_names={},
    ),
}

_WEIGHT_NAMES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(
        LLAMA, query_norm="model.layers.{layer}.self_attn.q_norm", key_norm="model.layers.{layer}.self_attn.k_norm"
    ),
    "phi3": replace(LLAMA, qkv=("model.layers.{layer}.self_attn.qkv_proj",), mlp_in=("model.layers.{layer}.mlp.gate_up_proj",)),
    "gemma2": replace(
        LLAMA,
        attention_post_norm="model.layers.{layer}.post_attention_layernorm",
        mlp_norm="model.layers.{layer}.pre_feedforward_layernorm",
        mlp_post_norm="model.layers.{layer}.post_feedforward_layernorm",
    ),
    "bert": BERT,
    "marian": MARIAN,
    "t5": T5,
}


def names_of(config: TransformerConfig) -> WeightNames:
    """Return the names of a network's weights, which a family may choose by its options."""
    if config.family == "t5" and config.gated_mlp:
        return _T5_GATED
    return _WEIGHT_NAMES[config.family] if config.source_vocab_size is None else _SEPARATE[config.family]


def position_table(config: TransformerConfig, layer: int) -> str | None:
    """Return the table of relative positions that this layer shares with others; None: it has
    none."""
    return names_of(config).of_layer(config, layer)[0].position_bias
