"""The FLOP formula against torch's own counter, and the table of peaks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.attention import Documents
from parallel.mesh import Group
from parallel.params import initialise
from trainer.flops import listed_peak, matmul_weights, training_flops
from trainer.model.families import TransformerConfig, translate
from trainer.model.transformer import Stage, blocks_of

LLAMA = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
SHAPES = {
    "llama": ("llama", LLAMA),
    "deep": ("llama", {**LLAMA, "num_hidden_layers": 5}),
    "grouped": ("llama", {**LLAMA, "num_key_value_heads": 2}),
    "one kv head": ("llama", {**LLAMA, "num_key_value_heads": 1}),
    "wide mlp": ("llama", {**LLAMA, "intermediate_size": 300}),
    "large vocabulary": ("llama", {**LLAMA, "vocab_size": 1000}),
    "tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "biased": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "gpt2 wide": ("gpt2", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 200}),
}
B, S = 2, 48


def counted(network: TransformerConfig) -> int:
    """FLOPs that torch sees in one forward and backward of [B, S] tokens."""
    stage = Stage(
        network,
        blocks_of(network),
        dtype=torch.float32,
        recompute="none",
        group=Group.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed=0),
    )
    tokens = torch.randint(0, network.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))
    # The counter has no entry for the CPU's fused attention; the plain one is the same mathematics in counted products.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        stage(tokens, Documents.whole_rows(B, S), tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_equals_torch_s_counter(name: str) -> None:
    network = translate(*SHAPES[name])
    attention = 6 * network.num_layers * network.num_heads * network.head_dim * B * S * S
    # The counter sees the full square of the scores; causal attention needs, and the formula counts, half of it.
    assert counted(network) == pytest.approx(training_flops(network, [S] * B) + attention, rel=0.01)


def test_attention_is_counted_inside_documents() -> None:
    network = translate(*SHAPES["llama"])
    packed, alone = training_flops(network, [24, 24]), training_flops(network, [48])
    per_square = 6 * network.num_layers * network.num_heads * network.head_dim
    assert alone - packed == per_square * (48**2 - 2 * 24**2)
    assert training_flops(network, []) == 0
    assert matmul_weights(network) * 6 * 48 == alone - per_square * 48**2


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_the_dense_figures_of_the_right_device(device: str, tflops: float | None) -> None:
    assert listed_peak(device, "bf16") == (None if tflops is None else tflops * 1e12)
