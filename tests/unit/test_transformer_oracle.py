"""Our network against transformers' own: the same weights give the same logits, loss and gradients.

transformers writes the folder, we read it, so the oracle also proves the weight names, the fused boxes and the
orientation. Every weight is random, biases and norms too: one that is mixed up or left out would not show at 0 or 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from parallel.documents import Documents
from parallel.loss import IGNORE
from parallel.tensor import TensorParallel
from tests.unit.oracle import (
    assert_close,
    assert_same_gradients,
    logical_gradients,
    next_labels,
    random_model,
    random_tokens,
    twins,
)
from tests.unit.shapes import LLAMA, MODELS, ONE_OF_EACH, B, S, V
from tests.unit.stages import stage_from
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.hf_config import from_hf
from trainer.model.transformer import Stage


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = twins(*MODELS[name], tmp_path)
    tokens = random_tokens()
    documents = Documents.whole_rows(B, S)
    expected = theirs(input_ids=tokens, labels=tokens)  # shifts the labels and takes the mean itself
    assert_close(ours(tokens, batch=MicroBatch(tokens, documents), output="logits"), expected.logits, 1e-5, "logits")
    loss_sum = ours(tokens, batch=MicroBatch(tokens, documents, next_labels(tokens, documents.lengths)))
    loss = loss_sum / (B * (S - 1))
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    assert_same_gradients(ours, theirs, 1e-5)


# transformers computes the rotary angles in fp32 whatever the model's format, which leaves 1e-6 in Llama.
@pytest.mark.parametrize(("model", "tolerance"), [(MODELS["gpt2-inner"], 1e-12), (MODELS["llama-biases"], 2e-6)])
def test_in_float64_the_difference_vanishes(model: tuple[str, dict[str, Any]], tolerance: float, tmp_path: Path) -> None:
    """A rounding difference shrinks with the format, a mistake stays."""
    theirs = random_model(*model)
    theirs.save_pretrained(tmp_path)
    theirs.double()
    ours = stage_from(tmp_path, dtype=torch.float64).double()
    tokens = random_tokens()
    documents = Documents.whole_rows(B, S)
    labels = next_labels(tokens, documents.lengths)
    expected = theirs(input_ids=tokens).logits  # its own loss would round the logits to fp32
    assert_close(ours(tokens, batch=MicroBatch(tokens, documents), output="logits"), expected, tolerance, "logits")
    nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).backward()
    (ours(tokens, batch=MicroBatch(tokens, documents, labels)) / (B * (S - 1))).backward()
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize(("family", "shape"), ONE_OF_EACH)
def test_a_packed_row_equals_each_document_alone(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = twins(family, shape, tmp_path)
    tokens, lengths = random_tokens(), ((13,), (4, 9), (1, 7, 5))
    logits = ours(tokens, batch=MicroBatch(tokens, Documents(lengths)), output="logits")
    loss_sum = ours(tokens, batch=MicroBatch(tokens, Documents(lengths), next_labels(tokens, lengths)))
    expected_sum = torch.zeros(())
    for row, row_lengths in enumerate(lengths):
        end = 0
        for length in row_lengths:
            start, end = end, end + length
            document = tokens[row : row + 1, start:end]
            expected = theirs(input_ids=document).logits
            assert_close(logits[row : row + 1, start:end], expected, 1e-5, f"logits of row {row} from {start}")
            log_p = expected[0, :-1].log_softmax(-1)
            expected_sum = expected_sum - log_p.gather(-1, document[0, 1:, None]).sum()
    torch.testing.assert_close(loss_sum, expected_sum, rtol=1e-6, atol=1e-5)
    num_targets = sum(n - 1 for row in lengths for n in row)
    (loss_sum / num_targets).backward()
    (expected_sum / num_targets).backward()
    assert_same_gradients(ours, theirs, 1e-5)


PACKED = ((4, 9), (4, 9), (2, 6, 5))  # two rows that attend in one call and one of its own


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("family", "shape"), ONE_OF_EACH)
@pytest.mark.parametrize("changed", [0, 1])
def test_a_document_does_not_change_one_bit_of_another(
    family: str, shape: dict[str, Any], changed: int, recompute: Literal["none", "selective", "full"], tmp_path: Path
) -> None:
    """Each token of one document is changed in turn; logits, loss and gradients of all others must stay bit-equal."""
    random_model(family, shape).save_pretrained(tmp_path)
    ours = stage_from(tmp_path, recompute=recompute)
    tokens = random_tokens()
    row = 1
    begin = sum(PACKED[row][:changed])
    span = range(begin, begin + PACKED[row][changed])
    others = torch.ones(B, S, dtype=torch.bool)
    others[row, span.start : span.stop] = False

    def run(tokens_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ours.zero_grad()
        labels = next_labels(tokens_BS, PACKED).masked_fill(~others, IGNORE)
        loss = ours(tokens_BS, batch=MicroBatch(tokens_BS, Documents(PACKED), labels))
        loss.backward()
        with torch.no_grad():
            logits = ours(tokens_BS, batch=MicroBatch(tokens_BS, Documents(PACKED)), output="logits")
        return logits, loss.detach(), logical_gradients(ours)

    logits, loss, gradients = run(tokens)
    for place in span:
        other = tokens.clone()
        other[row, place] = (other[row, place] + 7) % V
        logits_now, loss_now, gradients_now = run(other)
        assert torch.equal(logits_now[others], logits[others])
        assert not torch.equal(logits_now[row, place], logits[row, place]), "the changed token must matter to itself"
        assert torch.equal(loss_now, loss)
        for name, gradient in gradients.items():
            assert torch.equal(gradients_now[name], gradient), name


def test_without_boundaries_a_document_does_change_the_next(tmp_path: Path) -> None:
    """The test above can fail: one document per row lets the first token reach the last."""
    _, ours = twins(*MODELS["llama-gqa"], tmp_path)
    tokens = random_tokens()
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 7) % V
    documents = Documents.whole_rows(B, S)
    assert not torch.equal(
        ours(tokens, batch=MicroBatch(tokens, documents), output="logits")[:, -1],
        ours(other, batch=MicroBatch(other, documents), output="logits")[:, -1],
    )


@pytest.mark.parametrize(("family", "shape"), ONE_OF_EACH)
def test_recompute_changes_no_bit(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    random_model(family, shape).save_pretrained(tmp_path)
    tokens = random_tokens()
    seen = []
    for recompute in ("none", "full"):
        ours = stage_from(tmp_path, recompute=recompute)
        loss = ours(tokens, batch=MicroBatch(tokens, Documents(PACKED), next_labels(tokens, PACKED)))
        loss.backward()
        seen.append((loss.detach(), logical_gradients(ours)))
    assert torch.equal(seen[0][0], seen[1][0])
    for name, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][name]), name


def test_recompute_keeps_less() -> None:
    """Activations kept for backward, counted by autograd's own hook: `full` keeps a layer's input, not its inside."""
    kept_bytes = {}
    for recompute in ("none", "full"):
        config = from_hf("llama", {**LLAMA, "num_hidden_layers": 6})
        stage = Stage(
            config,
            blocks_of(config),
            dtype=torch.float32,
            recompute=recompute,
            tp=TensorParallel.alone(),
            device=torch.device("cpu"),
            fill=lambda block: [nn.init.normal_(p, std=0.1) for p in block.parameters()],
        )
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = stage(
                random_tokens(), batch=MicroBatch(random_tokens(), Documents(PACKED), next_labels(random_tokens(), PACKED))
            )
        kept_bytes[recompute] = sum(size for place, size in kept.items() if place not in weights)
        del loss
    assert kept_bytes["full"] < kept_bytes["none"] / 3
