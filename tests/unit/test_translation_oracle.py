"""Networks that translate against transformers' own: the same weights give the same logits, loss and gradients, a row of many
pairs the same as each pair alone; out to a folder and in again bit by bit.

Sizes are odd, sources and targets differ in length, and every weight is random, so that nothing hides behind a 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel import attention
from parallel.attention import _share_a_call
from parallel.documents import Documents
from parallel.loss import IGNORE
from parallel.params import initialise, owned_specs
from parallel.relative_bias import RelativeBias, by_place
from parallel.rng import Streams
from parallel.tensor import TensorParallel
from tests.unit.oracle import assert_close, assert_same_gradients, logical_gradients, random_translator, their_class
from tests.unit.shapes import MARIAN, T5, TRANSLATIONS, V
from tests.unit.stages import stage_from
from trainer.data.loader import MicroBatch
from trainer.model.blocks import blocks_of
from trainer.model.heads import Head
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import PretrainedWeights, assembled, read_config, write_folder
from trainer.model.names import names_of
from trainer.model.transformer import Stage, logical_specs

# Lengths of the sources and of the targets in each row: one pair that fills its half, pairs that leave room for filler on one
# side only, and on both.
HALF = 17
# Marian's table of positions is rounded to fp32 in transformers.
TOLERANCES = {"marian": 1e-6, "t5": 1e-10}
PAIRS: list[list[tuple[int, int]]] = [[(17, 17)], [(10, 9), (7, 2)], [(3, 12), (4, 5)], [(2, 3)] * 5]
SHORT = [[(2, 3)] * 5, [(1, 2)] * 8, [(4, 3), (1, 2), (3, 1), (2, 5), (6, 1)]]  # so many that they share one call of attention


def trained(theirs: Any) -> list[tuple[str, Tensor]]:
    """Also the bias of the logits, which Marian trains and transformers keeps; not the positions."""
    return [
        *((name, weight) for name, weight in nn.Module.named_parameters(theirs) if weight.requires_grad),
        *((name, buffer.requires_grad_()) for name, buffer in theirs.named_buffers()),
    ]


def twins(name: str, folder: Path) -> tuple[Any, Stage]:
    theirs = random_translator(*TRANSLATIONS[name])
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


def their_norm(norm: Any, x: Tensor) -> Tensor:
    """T5's, which transformers computes in fp32 whatever the format, in that of x."""
    weight: Tensor = norm.weight
    return weight * nn.functional.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


def test_short_pairs_share_a_call_and_others_do_not() -> None:
    for pairs, shares in ((PAIRS, False), (SHORT, True)):
        assert {_share_a_call(half) for half in rows_of(pairs)[2].sides} == {shares}


@pytest.mark.parametrize(("name", "pairs"), [*((name, PAIRS) for name in TRANSLATIONS), ("marian", SHORT), ("t5", SHORT)])
def test_rows_of_pairs_equal_transformers_on_each(
    name: str, pairs: list[list[tuple[int, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: gradients of keys are small sums of large terms."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    monkeypatch.setattr(T5LayerNorm, "forward", their_norm)
    tolerance = TOLERANCES[TRANSLATIONS[name][0]]
    random_translator(*TRANSLATIONS[name]).save_pretrained(tmp_path)
    theirs, ours = random_translator(*TRANSLATIONS[name]).double(), stage_from(tmp_path, dtype=torch.float64).double()
    weights = trained(theirs)
    theirs.named_parameters = lambda: weights
    tokens, labels, documents = rows_of(pairs)

    logits, loss_sum = (
        ours(tokens, batch=MicroBatch(tokens, documents), output="logits"),
        ours(tokens, batch=MicroBatch(tokens, documents, labels)),
    )
    expected_sum = torch.zeros((), dtype=torch.float64)
    for row, source, target in each_pair(pairs):
        expected = their_logits(theirs, tokens, row, source, target)
        got = logits[row, target.start - HALF : target.stop - HALF].detach()
        assert_close(got, expected.detach(), tolerance, f"logits of row {row} from {target.start}")
        expected_sum = expected_sum + nn.functional.cross_entropy(expected, labels[row, target], reduction="sum")
    torch.testing.assert_close(loss_sum, expected_sum, rtol=tolerance, atol=0.0)
    num_targets = (labels != IGNORE).sum()
    (loss_sum / num_targets).backward()
    (expected_sum / num_targets).backward()
    assert_same_gradients(ours, theirs, tolerance)


def decoder_looks_both_ways() -> Any:
    """The decoder's distances are in the encoder's buckets."""
    forward = RelativeBias.forward

    def both_ways(bias: RelativeBias, length: int) -> Tensor:
        bias.causal = False
        return forward(bias, length)

    return RelativeBias, "forward", both_ways


def distances_turned_round() -> Any:
    """From a key to a query."""
    return attention, "by_place", lambda bias_HX, *places: by_place(bias_HX.flip(1), *places)


def head_not_scaled() -> Any:
    return Head, "scale", property(lambda head: 1.0, lambda head, scale: None)


@pytest.mark.parametrize("mutation", [decoder_looks_both_ways, distances_turned_round, head_not_scaled])
def test_the_oracle_catches(mutation: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*mutation(), raising=False)
    theirs, ours = twins("t5", tmp_path)
    tokens, _, documents = rows_of(PAIRS[:1])
    expected, got = (
        their_logits(theirs, tokens, 0, slice(0, HALF), slice(HALF, 2 * HALF)),
        ours(tokens, batch=MicroBatch(tokens, documents), output="logits")[0],
    )
    with pytest.raises(AssertionError, match="logits"):
        assert_close(got, expected, 1e-3, "logits")


@pytest.mark.parametrize("pairs", [PAIRS, SHORT])
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_a_pair_sees_no_other(name: str, pairs: list[list[tuple[int, int]]], tmp_path: Path) -> None:
    _, ours = twins(name, tmp_path)
    tokens, _, documents = rows_of(pairs)
    for row, source, target in each_pair(pairs):
        other = tokens.clone()
        other[row, source.start] = other[row, source.start] % (V - 1) + 1
        with torch.no_grad():
            changed = (
                ours(other, batch=MicroBatch(other, documents), output="logits")
                != ours(tokens, batch=MicroBatch(tokens, documents), output="logits")
            ).any(-1)
        assert changed[row, target.start - HALF : target.stop - HALF].all(), "a target did not see all of its source"
        changed[row, target.start - HALF : target.stop - HALF] = False
        assert not changed.any(), "another target saw it"


DROPPING = {
    "marian": {**MARIAN, "dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2},
    "t5": {**T5, "dropout_rate": 0.2},
}


def test_each_half_drops_features_of_its_own(tmp_path: Path) -> None:
    random_translator("marian", {**MARIAN, "dropout": 0.2}).save_pretrained(tmp_path)
    ours = stage_from(tmp_path)
    tokens, documents = torch.arange(HALF).repeat(1, 2), Documents(((HALF, HALF),))
    for streams, alike in ((None, True), (Streams((5,)), False)):
        source, target = ours.embedding(tokens, documents, streams).chunk(2)
        assert torch.equal(source, target) == alike


@pytest.mark.parametrize("family", DROPPING)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(recompute: Any, family: str, tmp_path: Path) -> None:
    random_translator(family, DROPPING[family]).save_pretrained(tmp_path)
    tokens, labels, documents = rows_of(PAIRS)
    seen = []
    for how in ("none", recompute):
        ours = stage_from(tmp_path, recompute=how)
        loss = ours(tokens, batch=MicroBatch(tokens, documents, labels, streams=Streams((5, 6, 7, 8))))
        loss.backward()
        seen.append((loss.detach(), logical_gradients(ours)))
    assert torch.equal(seen[0][0], seen[1][0])
    for weight, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][weight]), weight


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_is_wherever_transformers_has_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_translator(family, DROPPING[family])
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")  # which calls the function that is counted
    calls, drop = [], nn.functional.dropout

    def counted(x: Tensor, p: float = 0.5, training: bool = True, *more: Any) -> Tensor:
        calls.append(p if training else 0.0)
        return drop(x, p, training, *more)

    monkeypatch.setattr(nn.functional, "dropout", counted)
    tokens, labels, documents = rows_of(PAIRS[:1])
    theirs.train()(input_ids=tokens[:, :HALF], decoder_input_ids=tokens[:, HALF:])
    sites: set[str] = set()
    streams = Streams((5,))
    monkeypatch.setattr(Streams, "_keeps", lambda self, site, rate, row, shape, device: _noted(site, shape, sites))
    stage_from(tmp_path)(tokens, batch=MicroBatch(tokens, documents, labels, streams=streams))
    assert calls.count(0.2) == len(sites)


def _noted(site: Any, shape: tuple[int, int], sites: set[str]) -> Tensor:
    sites.add(site if isinstance(site, str) else site[0])  # of one head, or block of queries
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    """What we write is what transformers wrote: the same tensors bit by bit, and a config that means the same."""
    theirs, ours = twins(name, tmp_path / "theirs")
    config = to_hf(ours.config, dtype="float32", eos_token_id=0, start_of_target=0)
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
        assert from_hf(hf_config["model_type"], hf_config) == ours.config
    specs = logical_specs(ours.config)
    PretrainedWeights(tmp_path / "ours").check_names(specs, ties=names_of(ours.config).ties(specs))


def test_what_the_first_folders_of_t5_hold_beside_it(tmp_path: Path) -> None:
    """A table that no model reads, the embedding again for each side, and what was said of its configs since."""
    random_translator("t5", T5).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {f"{side}.embed_tokens.weight": weights["shared.weight"].clone() for side in ("encoder", "decoder")}
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(11, 6)
    save_file(weights, tmp_path / "model.safetensors")
    config = from_hf("t5", {**read_config(tmp_path), "n_positions": 512, "output_past": True})
    specs, names = logical_specs(config), names_of(config)
    is_unused = partial(names.is_for_other_heads, config)
    PretrainedWeights(tmp_path).check_names(specs, ties=names.ties(specs), is_unused=is_unused)


@pytest.mark.parametrize(
    ("said", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),  # transformers 4
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),  # transformers 5
        ({"tie_word_embeddings": False, "scale_decoder_outputs": False}, False),  # ours, for both
    ],
)
def test_how_folders_of_t5_say_whether_the_head_is_tied(said: dict[str, bool], scaled: bool) -> None:
    config = from_hf("t5", said)
    assert (config.tied_head, config.scaled_head) == (scaled, scaled)


def test_the_first_weights_of_t5_are_as_large_as_in_transformers() -> None:
    """Standard deviations: with nothing that divides the logits of attention, those of queries are smaller."""
    shape = {**T5, "vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 200, "initializer_factor": 0.5}
    config = from_hf("t5", shape)
    stage = Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, seed=0),
    )
    from transformers import T5Config

    theirs = {name: weight.detach() for name, weight in their_class("t5")(T5Config(**shape)).named_parameters()}
    for name, weight in assembled((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage)):
        if "norm" not in name:  # of n numbers the deviation is known to 1 / sqrt(2 n): 9 % of the 64 that biases have
            assert float(weight.std() / theirs[name].std()) == pytest.approx(1.0, abs=0.25 if weight.numel() < 100 else 0.1), (
                name
            )
