"""Blocks' parameters against the modules that are built, their FLOPs against torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.documents import Documents
from parallel.params import initialise
from parallel.tensor import TensorParallel
from tests.unit.shapes import MODELS, TRANSLATIONS, V
from trainer.costs.blocks import block_costs, block_flops, block_parameters, count_parameters
from trainer.costs.flops import row_flops, training_flops, translation_flops
from trainer.data.loader import MicroBatch
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.transformer import Stage

S = 16


def stage(config: TransformerConfig, blocks: list[Block]) -> Stage:
    return Stage(
        config,
        blocks,
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed=0),
    )


@pytest.mark.parametrize("name", [*MODELS, *TRANSLATIONS])
def test_parameters_are_those_that_a_stage_of_the_block_has(name: str) -> None:
    config = from_hf(*{**MODELS, **TRANSLATIONS}[name])
    for block in blocks_of(config):
        built = sum(parameter.numel() for parameter in stage(config, [block]).parameters())
        assert block_parameters(config, block) == built == count_parameters(config, [block])
    whole = stage(config, blocks_of(config)).parameters()
    assert count_parameters(config) == sum(parameter.numel() for parameter in whole)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_the_blocks_are_those_of_the_model(name: str) -> None:
    config = from_hf(*MODELS[name])
    assert sum(block_flops(config, block, S) for block in blocks_of(config)) == training_flops(config, [S])


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_flops_of_a_translation_are_those_of_its_blocks(name: str) -> None:
    config = from_hf(*TRANSLATIONS[name])
    row = (3, S - 3, S, 1)  # two sources, then their targets
    assert sum(block_flops(config, block, S) for block in blocks_of(config)) == translation_flops(config, [(S, S)])
    assert row_flops(config, [row], trained_beside=None) == translation_flops(config, [(3, S), (S - 3, 1)])


@pytest.mark.parametrize("kind", ["embedding", "layer", "head"])
def test_flops_of_a_block_are_those_that_torch_counts(kind: str) -> None:
    """The plain attention kernel computes the whole square, of which half is counted here."""
    config = from_hf(*MODELS["llama-gqa"])
    block = next(block for block in blocks_of(config) if block.kind == kind)
    x: Any = torch.zeros(1, S, dtype=torch.int64) if kind == "embedding" else torch.ones(S, config.hidden_size)
    x = x if kind == "embedding" else x.requires_grad_()
    labels = torch.arange(S)[None] % V if kind == "head" else None
    built = stage(config, [block])
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        built(x, batch=MicroBatch(x, Documents(((S,),)), labels)).sum().backward()
    other_half = 6 * config.num_heads * config.head_dim * S * S * (kind == "layer")
    assert counter.get_total_flops() == pytest.approx(block_flops(config, block, S) + other_half, rel=0.01)


def test_an_embedding_is_cheap_and_not_free() -> None:
    """Llama 8B at 8192 tokens: a layer's 12.4 TFLOP take 19 times as long as the embedding's 6.3 GB of gradients and
    0.3 GB of rows."""
    config = from_hf(
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    )
    embedding, layer, *_, head = block_costs(config, seq_len=8192, micro_sequences=1)
    assert 0.04 < embedding / layer < 0.08
    assert 2.0 < head / layer < 2.2
    # With few tokens in a micro-batch the gradients' traffic is what counts.
    embedding, layer, *_ = block_costs(config, seq_len=512, micro_sequences=1)
    assert 0.5 < embedding / layer < 1


def test_a_micro_batch_costs_by_its_sequences_but_for_its_gradients() -> None:
    config = from_hf(*MODELS["llama-gqa"])
    one, two, three = (block_costs(config, seq_len=S, micro_sequences=n) for n in (1, 2, 3))
    assert [b - a for a, b in zip(one, two, strict=True)] == [c - b for b, c in zip(two, three, strict=True)]
    assert two[1] - one[1] == block_flops(config, Block("layer"), S)
