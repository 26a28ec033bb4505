"""The costs of each block of a model: its parameters, and its share of a step's time. No torch.

    time of a block, in FLOPs = its FLOPs + FLOPS_PER_BYTE · bytes that it moves without multiplying

This is for one micro-batch, forward and backward. The bytes are those of each parameter's gradient
and, for the embedding, those of the looked-up rows, because it has no FLOPs at all. What matrix
products move is included in their FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.costs.flops import (
    attention_flops,
    cross_attention_flops,
    cross_matmul_weights,
    head_matmul_weights,
    layer_matmul_weights,
)
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.names import names_of, position_table

# The FLOPs that a device computes while it moves a byte, if matrix products run at half of its
# peak: H100 989e12 / 3.35e12 / 2 = 148, A100 312e12 / 2.04e12 / 2 = 76, V100 125e12 / 0.9e12 / 2 =
# 69 (dense 16-bit peaks and memory bandwidths from the data sheets).
FLOPS_PER_BYTE = 100
# The bytes of a 16-bit gradient: written, read again, added to the fp32 sum of the micro-batches
# (read and written).
GRADIENT_BYTES = 2 + 2 + 4 + 4
# The bytes of an element of an embedded token: read and written forward; in backward its gradient
# is read, and added to the weight's.
LOOKUP_BYTES = 2 + 2 + 2 + 4


def block_costs(config: TransformerConfig, *, seq_len: int, micro_sequences: int) -> list[int]:
    """Return the time of each block for a micro-batch of one-document sequences [FLOPs, or moves
    that take as long]."""
    return [
        micro_sequences * block_flops(config, block, seq_len)
        + FLOPS_PER_BYTE * GRADIENT_BYTES * block_parameters(config, block)
        + FLOPS_PER_BYTE * LOOKUP_BYTES * micro_sequences * _lookups(config, seq_len, block) * config.hidden_size
        for block in blocks_of(config)
    ]


def _lookups(config: TransformerConfig, seq_len: int, block: Block) -> int:
    """Return the number of tokens that are embedded: both texts of a translation."""
    return seq_len * (2 if config.encoder_layers else 1) * (block.kind == "embedding")


def block_flops(config: TransformerConfig, block: Block, seq_len: int) -> int:
    """Return the FLOPs of forward and backward over one document of `seq_len` tokens, or a source
    and a target of that length each."""
    match block.kind:
        case "embedding":
            return 0
        case "layer":
            reads_source = block.layer < config.encoder_layers
            attention = attention_flops(config, seq_len, config.windows[block.layer], causal=config.causal and not reads_source)
            if config.encoder_layers and not reads_source:
                attention += cross_attention_flops(config, seq_len, seq_len)
            return 6 * layer_matmul_weights(config) * seq_len + attention
        case "head":
            return 6 * head_matmul_weights(config) * seq_len


def block_parameters(config: TransformerConfig, block: Block) -> int:
    """Return the number of elements in the weights that the block uses.

    A head has its own, even one tied to the embedding, and a layer its table of positions, even
    where layers share it.
    """
    D, F = config.hidden_size, config.ffn_size
    norm = D * (1 + config.norm_bias)
    match block.kind:
        case "embedding":
            positions = config.max_positions if config.positions == "learned" else 0
            of_source = config.source_vocab_size or 0
            return D * (config.vocab_size + of_source + positions + config.token_types) + config.embedding_norm * norm
        case "layer":
            queries, keys_values = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
            biases = config.qkv_bias * (queries + keys_values) + config.attention_out_bias * D
            biases += config.mlp_bias * (F * (2 if config.gated_mlp else 1) + D)
            norms = norm * (4 if config.norm_position == "sandwich" else 2) + 2 * config.head_dim * config.qk_norm
            biases += _table_elements(config)
            if config.encoder_layers and block.layer >= config.encoder_layers:
                biases += config.qkv_bias * (queries + keys_values) + config.attention_out_bias * D
                norms += norm
                return layer_matmul_weights(config) + cross_matmul_weights(config) + biases + norms
            ends_encoder = block.layer == config.encoder_layers - 1 and config.norm_position == "pre"
            return layer_matmul_weights(config) + biases + norms + ends_encoder * norm
        case "head" if config.classes:
            pools = names_of(config).pooler is not None
            final_norm = 0 if config.norm_position == "post" else norm
            return final_norm + len(config.classes) * (D + pools) + pools * (D * D + D)
        case "head":
            transform = config.head_transform * (D * D + D + norm)
            final_norm = 0 if config.norm_position == "post" else norm
            return D * config.vocab_size + transform + config.head_bias * config.vocab_size + final_norm


def count_parameters(config: TransformerConfig, blocks: Sequence[Block] | None = None) -> int:
    """Return the number of elements in the weights of these blocks, by default of the whole model;
    shared weights count once."""
    chosen = blocks_of(config) if blocks is None else blocks
    tied = config.ties_head and {"embedding", "head"} <= {block.kind for block in chosen}
    tables = [position_table(config, block.layer) for block in chosen if block.kind == "layer"]
    shared = tied * config.vocab_size * config.hidden_size + (len(tables) - len(set(tables))) * _table_elements(config)
    return sum(block_parameters(config, block) for block in chosen) - shared


def _table_elements(config: TransformerConfig) -> int:
    return config.relative_buckets * config.num_heads
