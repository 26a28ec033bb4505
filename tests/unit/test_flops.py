"""Model FLOPs against torch's own counter, which sees every matrix product that is really done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.documents import Documents
from parallel.params import initialise
from parallel.tensor import TensorParallel
from tests.unit.shapes import BERT, GPT2, LLAMA, V
from trainer.costs.flops import PEAKS, listed_peak, matmul_weights, training_flops
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.transformer import Stage

ROWS = ((16,), (5, 11), (1, 1, 14))
WHOLE_ROWS = ((32,), (32,))
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "llama-gqa": ("llama", LLAMA, ROWS),
    "llama-mqa": ("llama", {**LLAMA, "num_key_value_heads": 1}, ROWS),
    "llama-mha": ("llama", {**LLAMA, "num_key_value_heads": 6}, WHOLE_ROWS),
    "llama-wide-heads": ("llama", {**LLAMA, "head_dim": 20}, ROWS),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}, ROWS),
    "llama-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}, ROWS),
    "llama-deep": ("llama", {**LLAMA, "num_hidden_layers": 7}, WHOLE_ROWS),
    "llama-narrow-mlp": ("llama", {**LLAMA, "intermediate_size": 11}, WHOLE_ROWS),
    "gpt2": ("gpt2", {**GPT2, "n_positions": 32}, ROWS),
    "gpt2-whole-rows": ("gpt2", {**GPT2, "n_positions": 32}, WHOLE_ROWS),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}, ROWS),
    "gpt2-inner": ("gpt2", {**GPT2, "n_inner": 13, "n_layer": 3}, ROWS),
    "bert": ("bert", BERT, ROWS),
}


def counted_flops(config: TransformerConfig, lengths: tuple[tuple[int, ...], ...]) -> int:
    """Of one forward and backward. The plain attention kernel computes the whole square, and the counter sees it."""
    stage = Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed=0),
    )
    tokens = torch.randint(0, V, (len(lengths), sum(lengths[0])), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        stage(tokens, batch=MicroBatch(tokens, Documents(lengths), tokens.roll(-1, dims=1))).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts_with_causal_attention_at_half(name: str) -> None:
    family, shape, rows = SHAPES[name]
    config = from_hf(family, shape)
    lengths = [n for row in rows for n in row]
    squares = sum(n * n for n in lengths)
    # Q Kᵀ and P V over the whole square: 2 products of 2 FLOPs, forward and twice that backward.
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * squares
    products = 6 * matmul_weights(config) * sum(lengths)
    assert counted_flops(config, rows) == pytest.approx(products + attention, rel=0.01)
    assert training_flops(config, lengths) == products + (attention // 2 if config.causal else attention)


def test_documents_cost_the_square_of_their_own_length() -> None:
    config = from_hf("llama", LLAMA)
    one, four = training_flops(config, [64]), training_flops(config, [16] * 4)
    assert one - four == 6 * config.num_layers * config.num_heads * config.head_dim * (64**2 - 4 * 16**2)
    assert training_flops(config, []) == 0


def test_a_known_model() -> None:
    """Llama-2 7B at 4096 tokens: 6 · 6.61e9 matmul weights + 6 · 32 · 4096 · 4096 per token."""
    config = from_hf(
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    )
    assert matmul_weights(config) == 6_738_415_616 - 32000 * 4096 - 65 * 4096  # all but the embedding and the norms
    per_token = training_flops(config, [4096]) / 4096
    assert per_token == pytest.approx(6 * 6.607e9 + 6 * 32 * 4096 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-PCIE-32GB", "V100 PCIE"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
    ],
)
def test_a_device_is_found_by_its_name(name: str, entry: str) -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        assert listed_peak(name, dtype) == PEAKS[entry].get(dtype)
    assert listed_peak(name, "fp16") is not None


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA H800", "Tesla T4", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""])
def test_a_device_that_is_not_on_the_list_is_measured(name: str) -> None:
    assert listed_peak(name, "bf16") is None


def test_peaks_are_dense() -> None:
    """With sparsity the data sheets print 1979e12 for the H100 in bf16: twice what a matrix product can reach."""
    assert listed_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert listed_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert listed_peak("Tesla V100-SXM2-16GB", "bf16") is None, "it has no bf16 units"
