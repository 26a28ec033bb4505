"""Where each weight lives in a family's Hugging Face checkpoint: one table per family.

Adding a family: its config translation goes to `families.py`, its names here.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.linear import Output
from trainer.model.families import TransformerConfig


@dataclass(frozen=True)
class WeightNames:
    """Names in a Hugging Face checkpoint; those of a layer contain `{layer}`.

    `qkv`: one module that holds queries, keys and values in this order, or three. `mlp_in`: [up] or [gate, up].
    `transposed`: linear weights are stored [in, out].
    """

    embedding: str
    positions: str | None
    attention_norm: str
    qkv: tuple[str, ...]
    attention_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    final_norm: str
    head: str
    transposed: bool = False

    def query_key_value(self, config: TransformerConfig, layer: int) -> tuple[Output, Output, Output]:
        """The three outputs of the fused projection and the boxes of the checkpoint that they are."""
        K = config.head_dim
        features = (config.num_heads * K, config.num_kv_heads * K, config.num_kv_heads * K)
        names = [name.format(layer=layer) for name in self.qkv]
        if len(names) == 3:
            q, k, v = (Output(name, n) for name, n in zip(names, features, strict=True))
        else:
            starts = (0, features[0], features[0] + features[1])
            q, k, v = (Output(names[0], n, at, sum(features)) for n, at in zip(features, starts, strict=True))
        return q, k, v

    def mlp_inputs(self, config: TransformerConfig, layer: int) -> list[Output]:
        return [Output(name.format(layer=layer), config.ffn_size) for name in self.mlp_in]


WEIGHT_NAMES = {
    "gpt2": WeightNames(
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
    ),
    "llama": WeightNames(
        embedding="model.embed_tokens.weight",
        positions=None,
        attention_norm="model.layers.{layer}.input_layernorm",
        qkv=tuple(f"model.layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"),
        attention_out="model.layers.{layer}.self_attn.o_proj",
        mlp_norm="model.layers.{layer}.post_attention_layernorm",
        mlp_in=("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
        mlp_out="model.layers.{layer}.mlp.down_proj",
        final_norm="model.norm",
        head="lm_head.weight",
    ),
}
