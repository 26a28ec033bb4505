"""Networks that translate against transformers' own: the same weights give the same logits, loss and gradients, a row of many
pairs the same as each pair alone; out to a folder and in again bit by bit.

Sizes are odd, sources and targets differ in length, and every weight is random, so that nothing hides behind a 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.attention import Documents
from parallel.loss import IGNORE
from parallel.params import owned_specs
from parallel.rng import Streams
from tests.unit.test_transformer_oracle import assert_close, assert_same_gradients, logical_gradients, stage_from
from trainer.model.families import FAMILIES
from trainer.model.hugging_face import PretrainedWeights, read_config, write_folder
from trainer.model.names import names_of
from trainer.model.transformer import Stage, logical_specs
from trainer.model.translation import to_hf_config, translate

V = 67
MARIAN = {
    "vocab_size": V,
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "max_position_embeddings": 40,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("marian", MARIAN),
    "marian-scaled-relu": ("marian", {**MARIAN, "scale_embedding": True, "activation_function": "relu"}),
    "marian-separate": (
        "marian",
        {
            **MARIAN,
            "share_encoder_decoder_embeddings": False,
            "vocab_size": 71,
            "decoder_vocab_size": V,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "activation_function": "swish",
        },
    ),
}
# Lengths of the sources and of the targets in each row: one pair that fills its half, pairs that leave room for filler on one
# side only, on both, and so many that they share one call of attention.
HALF = 17
TOLERANCE = 1e-6  # transformers rounds its table of positions to fp32 and its relative distances' logarithms
PAIRS: list[list[tuple[int, int]]] = [[(17, 17)], [(10, 9), (7, 2)], [(3, 12), (4, 5)], [(2, 3)] * 5]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tensors as small as these ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def their_class(family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].architecture)


def random_model(family: str, shape: dict[str, Any]) -> Any:
    """In fp32 with every weight drawn at random around 0, those of norms around 1, the bias of the logits too."""
    from transformers import CONFIG_MAPPING

    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0}
    if family == "marian":
        tokens["forced_eos_token_id"] = 0
    model = their_class(family)(CONFIG_MAPPING[family](**shape, **tokens)).eval()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" not in name:
                weight.normal_(float("norm" in name.lower() and name.endswith("weight")), 0.2, generator=stream)
    return model


def trained(theirs: Any) -> list[tuple[str, Tensor]]:
    """Also the bias of the logits, which Marian trains and transformers keeps; not the positions."""
    return [
        *((name, weight) for name, weight in nn.Module.named_parameters(theirs) if weight.requires_grad),
        *((name, buffer.requires_grad_()) for name, buffer in theirs.named_buffers()),
    ]


def twins(name: str, folder: Path) -> tuple[Any, Stage]:
    theirs = random_model(*MODELS[name])
    theirs.save_pretrained(folder)
    return theirs, stage_from(folder)


def rows_of(pairs: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor, Documents]:
    """tokens and labels [B, 2 · HALF] of these pairs with filler behind them; each target's last label is the end."""
    stream = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, V, (len(pairs), 2 * HALF), generator=stream)
    labels = torch.full_like(tokens, IGNORE)
    lengths = []
    for row, of_row in enumerate(pairs):
        halves = []
        for side in (0, 1):
            taken = [pair[side] for pair in of_row]
            halves += taken + [HALF - sum(taken)] * (sum(taken) < HALF)
        lengths.append(tuple(halves))
        for end, (_, length) in zip(accumulate(pair[1] for pair in of_row), of_row, strict=True):
            first = HALF + end - length
            labels[row, first : first + length - 1] = tokens[row, first + 1 : first + length]
            labels[row, first + length - 1] = 0
    return tokens, labels, Documents(tuple(lengths))


def each_pair(pairs: list[list[tuple[int, int]]]) -> Iterator[tuple[int, slice, slice]]:
    """Row, and where in it the source and the target of each pair are."""
    for row, of_row in enumerate(pairs):
        source_end, target_end = 0, HALF
        for source, target in of_row:
            source_end, target_end = source_end + source, target_end + target
            yield row, slice(source_end - source, source_end), slice(target_end - target, target_end)


def their_logits(theirs: Any, tokens: Tensor, row: int, source: slice, target: slice) -> Tensor:
    logits: Tensor = theirs(input_ids=tokens[row : row + 1, source], decoder_input_ids=tokens[row : row + 1, target]).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_pairs_equal_transformers_on_each(name: str, tmp_path: Path) -> None:
    """In float64: gradients of keys are small sums of large terms."""
    random_model(*MODELS[name]).save_pretrained(tmp_path)
    theirs, ours = random_model(*MODELS[name]).double(), stage_from(tmp_path, dtype=torch.float64).double()
    weights = trained(theirs)
    theirs.named_parameters = lambda: weights
    tokens, labels, documents = rows_of(PAIRS)

    logits, loss_sum = ours(tokens, documents), ours(tokens, documents, labels)
    expected_sum = torch.zeros((), dtype=torch.float64)
    for row, source, target in each_pair(PAIRS):
        expected = their_logits(theirs, tokens, row, source, target)
        got = logits[row, target.start - HALF : target.stop - HALF].detach()
        assert_close(got, expected.detach(), TOLERANCE, f"logits of row {row} from {target.start}")
        expected_sum = expected_sum + nn.functional.cross_entropy(expected, labels[row, target], reduction="sum")
    torch.testing.assert_close(loss_sum, expected_sum, rtol=TOLERANCE, atol=0.0)
    num_targets = (labels != IGNORE).sum()
    (loss_sum / num_targets).backward()
    (expected_sum / num_targets).backward()
    assert_same_gradients(ours, theirs, TOLERANCE)


def test_a_pair_sees_no_other(tmp_path: Path) -> None:
    _, ours = twins("marian", tmp_path)
    tokens, _, documents = rows_of(PAIRS)
    for row, source, target in each_pair(PAIRS):
        other = tokens.clone()
        other[row, source.start] = other[row, source.start] % (V - 1) + 1
        with torch.no_grad():
            changed = (ours(other, documents) != ours(tokens, documents)).any(-1)
        assert changed[row, target.start - HALF : target.stop - HALF].all(), "a target did not see all of its source"
        changed[row, target.start - HALF : target.stop - HALF] = False
        assert not changed.any(), "another target saw it"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(recompute: Any, tmp_path: Path) -> None:
    shape = {**MARIAN, "dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    random_model("marian", shape).save_pretrained(tmp_path)
    tokens, labels, documents = rows_of(PAIRS)
    seen = []
    for how in ("none", recompute):
        ours = stage_from(tmp_path, recompute=how)
        loss = ours(tokens, documents, labels, Streams((5, 6, 7, 8)))
        loss.backward()
        seen.append((loss.detach(), logical_gradients(ours)))
    assert torch.equal(seen[0][0], seen[1][0])
    for weight, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][weight]), weight


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    """What we write is what transformers wrote: the same tensors bit by bit, and a config that means the same."""
    theirs, ours = twins(name, tmp_path / "theirs")
    config = to_hf_config(ours.config, dtype="float32", eos_token_id=0, start_of_target=0)
    tensors = ((spec, parameter.detach()) for _, parameter, spec in owned_specs(ours))
    write_folder(tensors, tmp_path / "ours", dtype=torch.float32, config=config, save_beside=lambda folder: None)

    written, original = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[weight]) for weight, tensor in written.items())
    loaded, report = their_class(ours.config.family).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    tokens, _, _ = rows_of(PAIRS)
    with torch.no_grad():
        for row, source, target in each_pair(PAIRS):
            got, expected = (their_logits(model, tokens, row, source, target) for model in (loaded.eval(), theirs))
            assert torch.equal(got, expected)
    for side in ("ours", "theirs"):
        hf_config = read_config(tmp_path / side)
        assert translate(hf_config["model_type"], hf_config) == ours.config
    specs = logical_specs(ours.config)
    PretrainedWeights(tmp_path / "ours").check_names(specs, ties=names_of(ours.config).ties(specs))
