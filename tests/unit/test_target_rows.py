"""A head computes the targets alone: the same losses, statistics, scores and gradients as from all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.documents import Documents
from parallel.loss import IGNORE, VocabParallelHead
from parallel.params import Init, initialise
from parallel.rng import Streams
from parallel.tensor import TensorParallel
from tests.unit.shapes import TINY, TINY_DECODER
from trainer import schema
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.heads import NextToken
from trainer.model.hf_config import from_hf
from trainer.model.preference_losses import Pairs
from trainer.model.transformer import Stage

CPU = torch.device("cpu")
B, S = 2, 16
# Chosen and rejected answers, or sources and targets, of two pairs in each row, and filler behind them.
LENGTHS = ((4, 4, 3, 5), (5, 3, 4, 4))
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": TINY_DECODER,
    "bert": {**TINY["bert"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "marian": {**TINY["marian"], "dropout": 0.0, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "t5": {**TINY["t5"], "dropout_rate": 0.3},  # also behind the last norm
}


def stage_of(family: str, dtype: torch.dtype) -> Stage:
    network = from_hf(family, {**NETWORKS[family], "vocab_size": 23})
    return Stage(
        network,
        blocks_of(network),
        dtype=dtype,
        recompute="none",
        tp=TensorParallel.alone(),
        device=CPU,
        fill=lambda block: initialise(block, seed=0),
    ).to(dtype)


def batch_of(network: TransformerConfig) -> MicroBatch:
    """Some tokens of each document are learned; in rows of translations, only those of the second half."""
    stream = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, network.vocab_size, (2, B, S), generator=stream)
    is_target = torch.tensor(
        [[0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 1, 0, 0] + [1, 1, 0, 1] * 2]
    ).bool()
    if network.encoder_layers:
        is_target[:, : S // 2] = False
    reference = torch.randn(2 * 4, generator=stream, dtype=torch.float64)
    return MicroBatch(tokens, Documents(LENGTHS), labels.masked_fill(~is_target, IGNORE), reference, Streams((1, 2)))


def loss_and_gradients(stage: Stage, batch: MicroBatch) -> list[Tensor]:
    stage.zero_grad()
    loss = stage(batch.tokens_BS, batch=batch)
    loss.sum().backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in stage.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("objective", [NextToken(0.1), Pairs(schema.Preference())], ids=["tokens", "pairs"])
@pytest.mark.parametrize("family", NETWORKS)
def test_the_targets_alone_give_what_all_tokens_give(family: str, objective: Any) -> None:
    stage = stage_of(family, torch.float64)
    head = getattr(stage.head, "head", stage.head)
    head.objective = objective
    given = batch_of(stage.config)
    alone = given.on(CPU, given.streams)
    assert alone.places_L is not None
    assert len(alone.places_L) == given.num_targets
    for got, expected in zip(loss_and_gradients(stage, alone), loss_and_gradients(stage, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)  # sums of other runs of tokens
    with torch.no_grad():
        for output in ("sums", "scores"):
            got, expected = (stage(batch.tokens_BS, batch=batch, output=output) for batch in (alone, given))
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_no_token_is_singled_out_where_nearly_all_are_targets() -> None:
    given = batch_of(from_hf("llama", TINY_DECODER))
    whole = replace(given, labels_BS=torch.ones(B, S, dtype=torch.int64))
    assert whole.on(CPU).places_L is None
    nothing = replace(given, labels_BS=torch.full((B, S), IGNORE)).on(CPU).places_L
    assert nothing is not None
    assert len(nothing) == 0
    assert given.on(CPU).without_labels().places_L is None


def test_a_row_without_targets_has_no_gradient() -> None:
    stage = stage_of("llama", torch.float32)
    given = batch_of(stage.config)
    empty = replace(given, labels_BS=torch.full((B, S), IGNORE)).on(CPU)
    loss, *gradients = loss_and_gradients(stage, empty)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def test_a_micro_batch_without_targets_gives_the_head_a_gradient_of_zeros() -> None:
    for loss in ("loss_sum", "token_losses"):
        head = VocabParallelHead(8, 4, name="head", init=Init(), tp=TensorParallel.alone())
        head.weight = torch.nn.Parameter(torch.ones(8, 4))
        hidden_LD = torch.zeros(0, 4, requires_grad=True)
        getattr(head, loss)(hidden_LD, torch.zeros(0, dtype=torch.int64)).sum().backward()
        assert head.weight.grad is not None
        assert not head.weight.grad.any()
