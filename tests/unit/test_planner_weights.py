"""The planner's weights of a rank are those that its model declares: of every family, at every degree, under every tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import parallel.attention
import parallel.loss
from parallel.mesh import Group
from parallel.params import Role, initialise, owned_specs
from parallel.quantized import CODES_PER_BYTE
from parallel.tensor import TensorParallel
from tests.unit.shapes import T5, TRANSLATIONS
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.transformer import Stage
from trainer.planner import activations
from trainer.planner.weights import QUANTIZED_BYTES, RankWeights, Weight
from trainer.schema import Tuning
from trainer.tuning.adapt import adaptation, quantized_weights, quantizing
from trainer.tuning.methods import METHODS

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"vocab_size": 67, "num_hidden_layers": 3, "max_position_embeddings": 32}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": 67, "n_positions": 32, "n_embd": 256, "n_layer": 3, "n_head": 4}),
    **{family: (family, {**SMALL, **WIDE}) for family in ("llama", "mistral", "qwen2", "phi3")},
    **{family: (family, {**SMALL, **WIDE, "head_dim": 32}) for family in ("qwen3", "gemma2")},
    "llama-tied-biases": ("llama", {**SMALL, **WIDE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "bert": ("bert", {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}),
    **{
        name: (family, {**config, **({"d_model": 256} | ({"d_ff": 512} if family == "t5" else {}))})
        for name, (family, config) in TRANSLATIONS.items()
        if name in ("marian", "marian-separate")
    },
    "t5": ("t5", {**T5, "num_heads": 4}),
}


def network_of(name: str) -> TransformerConfig:
    family, config = NETWORKS[name]
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    return from_hf(family, {**config, **(heads if family == "marian" else {})})


def declared(network: TransformerConfig, tensor: int, tuning: Tuning, blocks: list[Block], *, tied: bool) -> Iterator[Weight]:
    """The parameters of a stage as it is built on the meta device."""
    group = Group(rank=0, ranks=tuple(range(tensor)), handle=None)
    stage = Stage(
        network,
        blocks,
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel(group, sequence=tensor > 1),
        device=torch.device("meta"),
        fill=lambda block: None,
        adapt=adaptation(tuning, network),
        tied_over=Group(rank=0, ranks=(0, 1), handle=None) if tied else None,
    )
    for _, parameter, spec in owned_specs(stage):
        yield Weight(tuple(parameter.shape), spec.role is Role.MATRIX, parameter.requires_grad)


def planned(network: TransformerConfig, tensor: int, tuning: Tuning, blocks: list[Block]) -> list[Weight]:
    weights = RankWeights(network=network, tensor=tensor, tuning=tuning).of_stages({0: blocks})
    return [replace(weight, quantized=None) for weight in weights]


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.grid), 2, pytest.param(4, marks=pytest.mark.grid)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_at_every_degree(name: str, tensor: int) -> None:
    network, tuning = network_of(name), Tuning()
    blocks = blocks_of(network)
    assert planned(network, tensor, tuning, blocks) == list(declared(network, tensor, tuning, blocks, tied=False))
    for part in (blocks[:2], blocks[2:-2], blocks[-2:]):
        assert planned(network, tensor, tuning, part) == list(declared(network, tensor, tuning, part, tied=True))


TUNED = {name: [] if name == "qwen3" else [pytest.mark.grid] for name in ("gpt2", "llama-tied-biases", "qwen3", "phi3", "bert")}


@pytest.mark.parametrize("partly", [False, pytest.param(True, marks=pytest.mark.grid)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in TUNED.items()])
def test_every_tuning(name: str, method: str, partly: bool) -> None:
    """`partly`: beside the attention alone."""
    targets = ["attention"] if partly and METHODS[method].words else None
    network = replace(network_of(name), new_tokens=(3, 40, 41, 66))
    tuning = Tuning.model_validate({"method": method, "targets": targets, "rank": 3})
    blocks = blocks_of(network)
    for tensor in (2, 4) if network.num_kv_heads == 2 else (1, 2):  # with four ranks, two share a key/value head
        assert planned(network, tensor, tuning, blocks) == list(declared(network, tensor, tuning, blocks, tied=False))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_head_over_classes(name: str) -> None:
    network = replace(network_of(name), classes=("a", "b", "c"))
    blocks = blocks_of(network)
    assert planned(network, 2, Tuning(), blocks) == list(declared(network, 2, Tuning(), blocks, tied=False))


def test_numbers_that_are_written_twice_are_equal() -> None:
    """The planner does without torch, which their owners import."""
    assert activations.QUERY_BLOCK == parallel.attention.QUERY_BLOCK
    for rows, hidden_size in ((100, 8), (32_000, 64), (128_256, 4096)):
        assert activations.chunk_tokens(rows, hidden_size) == parallel.loss.chunk_tokens(rows, hidden_size)
    assert {form: 1 / codes for form, codes in CODES_PER_BYTE.items()} == QUANTIZED_BYTES


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantized_weights_have_their_bytes(form: str) -> None:
    network = network_of("qwen2")
    tuning = Tuning.model_validate({"method": "lora", "quantize": form})
    stage = Stage(
        network,
        blocks_of(network),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=quantizing(lambda block: initialise(block, seed=0), tuning),
        adapt=adaptation(tuning, network),
    )
    weights = RankWeights(network=network, tensor=1, tuning=tuning).of_stages({0: blocks_of(network)})
    planned_bytes = [weight.quantized_bytes for weight in weights if weight.quantized]
    assert planned_bytes == [weight.num_bytes for weight in quantized_weights(stage)]
