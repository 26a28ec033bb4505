"""Model FLOPs and their share of the device's peak (MFU). No torch.

The convention: a multiply-add is 2 FLOPs; backward costs twice the forward; recomputation is not
counted; causal attention is counted at half, bidirectional in full, and only inside documents and
windows, which is the work that the mathematics needs.

    step FLOPs = 6 · (matmul weights) · tokens
               + 6 · H · K · Σ over layers and documents of n² − (n − w)²

The first term is the 2·3 of forward and backward for each weight of the layers and the head (an
embedding lookup multiplies nothing). The second is half of the 12 · H · K · n² for the two products
Q Kᵀ and P V of a document of n tokens, less the triangle that lies beyond a layer's window of w < n
tokens; for bidirectional attention it is the whole square.

In a translation the layers of the encoder see the source's tokens, and those of the decoder and the
head the target's. The attention of a target of m tokens to its source of n tokens adds 12 · H · K ·
m · n; of its matrices each token is multiplied with one half, which costs 6 per weight.

A frozen weight (tuning) has no gradient of its own, so it costs 4 instead of 6; weights trained
beside it cost 6.

For a model of family "auto" the first term counts its matrices (of experts only those that a token
is sent to), and the second takes H · K and the number of layers from its config: windows are not
known, and without those keys there is no second term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import singledispatch

from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig
from trainer.model.network import Network
from trainer.schema import ProductFormat

# Dense peaks of matrix products in FLOP/s, from the vendors' data sheets: never the "with sparsity"
# figures, which are twice as high. fp32 is the exact one, without TF32. A name is found by its
# words; a variant stands before the model whose name it contains.
PEAKS: dict[str, dict[ProductFormat, float]] = {
    "H200 NVL": {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "V100S": {"fp16": 130e12, "fp32": 16.4e12},
    "V100 PCIE": {"fp16": 112e12, "fp32": 14e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
}


def matmul_weights(config: TransformerConfig) -> int:
    """Return the number of weights that each token is multiplied with, in a network of one text."""
    return config.num_layers * layer_matmul_weights(config) + head_matmul_weights(config)


def layer_matmul_weights(config: TransformerConfig) -> int:
    D, K = config.hidden_size, config.head_dim
    attention = D * K * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = D * config.ffn_size * (3 if config.gated_mlp else 2)
    return attention + mlp


def cross_matmul_weights(config: TransformerConfig) -> int:
    """Return the number of weights of a layer's attention to the source: half for a target's token,
    half for a source's."""
    return config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)


def head_matmul_weights(config: TransformerConfig) -> int:
    if config.classes:
        return 0  # it sees one token of each document
    return config.vocab_size * config.hidden_size + config.head_transform * config.hidden_size**2


def attention_flops(config: TransformerConfig, length: int, window: int | None, *, causal: bool | None = None) -> int:
    """Return the FLOPs of Q Kᵀ and P V in one layer over a document of `length` tokens, forward and
    backward.

    `causal` None: as the network.
    """
    beyond = 0 if window is None else max(0, length - window)
    per_square = (6 if (config.causal if causal is None else causal) else 12) * config.num_heads * config.head_dim
    return per_square * (length * length - beyond * beyond)


def cross_attention_flops(config: TransformerConfig, source: int, target: int) -> int:
    """Return the FLOPs of one layer's attention between a target and its source, with its matrices,
    forward and backward."""
    projections = 3 * cross_matmul_weights(config) * (source + target)
    return projections + 12 * config.num_heads * config.head_dim * source * target


def translation_flops(config: TransformerConfig, pairs: Iterable[tuple[int, int]]) -> int:
    """Return the FLOPs of forward and backward over sources and targets of these lengths
    [tokens]."""
    encoders, decoders = config.encoder_layers, config.num_layers - config.encoder_layers
    weights, flops = layer_matmul_weights(config), 0
    for source, target in pairs:
        flops += encoders * (6 * weights * source + attention_flops(config, source, None, causal=False))
        flops += decoders * (6 * weights * target + attention_flops(config, target, None))
        flops += decoders * cross_attention_flops(config, source, target) + 6 * head_matmul_weights(config) * target
    return flops


def row_flops(network: Network, rows: Iterable[Sequence[int]], *, trained_beside: int | None) -> int:
    """Return the FLOPs of forward and backward over rows of documents of these lengths [tokens].

    The first half of a translation's row are sources, the second their targets. `trained_beside`:
    see `training_flops`.
    """
    return _of_rows(network, rows, trained_beside)


def training_flops(network: Network, document_lengths: Iterable[int], *, trained_beside: int | None = None) -> int:
    """Return the FLOPs of forward and backward over documents of these lengths [tokens].

    `trained_beside` is the number of weights that are trained beside the network's own, which are
    then frozen; None if its own are trained.
    """
    return _of_documents(network, document_lengths, trained_beside)


@singledispatch
def _of_rows(network: Network, rows: Iterable[Sequence[int]], trained_beside: int | None) -> int:
    return _of_documents(network, (length for row in rows for length in row), trained_beside)


@_of_rows.register
def _(network: TransformerConfig, rows: Iterable[Sequence[int]], trained_beside: int | None) -> int:
    if not network.encoder_layers:
        return _of_documents(network, (length for row in rows for length in row), trained_beside)
    pairs = (pair for row in rows for pair in zip(row[: len(row) // 2], row[len(row) // 2 :], strict=True))
    return translation_flops(network, pairs)


@singledispatch
def _of_documents(network: Network, lengths: Iterable[int], trained_beside: int | None) -> int:
    raise TypeError(type(network))


@_of_documents.register
def _(network: AutoNetwork, lengths: Iterable[int], trained_beside: int | None) -> int:
    known = list(lengths)
    return 6 * network.matmul_weights * sum(known) + 6 * network.attention_width * sum(n * n for n in known)


@_of_documents.register
def _(network: TransformerConfig, lengths: Iterable[int], trained_beside: int | None) -> int:
    layers_with = Counter(network.windows)
    tokens = attention = 0
    for length in lengths:
        tokens += length
        attention += sum(layers * attention_flops(network, length, window) for window, layers in layers_with.items())
    if trained_beside is not None:
        return (4 * matmul_weights(network) + 6 * trained_beside) * tokens + attention
    return 6 * matmul_weights(network) * tokens + attention


def listed_peak(device_name: str, dtype: ProductFormat) -> float | None:
    """Return the FLOP/s of one device; None if it is not listed, or only a slice of a device
    (MIG)."""
    if "MIG" in device_name.split():
        return None
    for name, peaks in PEAKS.items():
        if all(word in device_name for word in name.split()):
            return peaks.get(dtype)
    return None
