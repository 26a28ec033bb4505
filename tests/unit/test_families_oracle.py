"""Each family against transformers' own model: the same weights give the same logits, loss and gradients, on one process
and with the heads, the MLP and the vocabulary divided over tensor ranks; out to a folder and in again bit by bit.

Sizes are odd, windows are shorter than the sequence, and every weight is random, so that nothing hides behind a 0 or 1.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel import attention
from parallel.attention import WeightDropout, attend
from parallel.documents import Documents
from parallel.embedding import rotary_tables
from parallel.loss import IGNORE, VocabParallelHead
from parallel.mesh import Group, Mesh
from parallel.norm import QueryKeyNorm, RMSNorm
from parallel.params import Init, initialise, owned_specs
from parallel.rng import Streams
from parallel.soft_cap import soft_cap
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from tests.spawn import spawn
from tests.unit.oracle import (
    assert_close,
    assert_same_gradients,
    largest_element,
    logical_gradients,
    next_labels,
    random_tokens,
)
from tests.unit.shapes import B, S, V
from tests.unit.stages import stage_from
from trainer.data.loader import MicroBatch
from trainer.model import transformer
from trainer.model.blocks import blocks_of
from trainer.model.families import FAMILIES
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import PretrainedWeights, read_config, write_folder
from trainer.model.names import names_of
from trainer.model.transformer import Stage, _frequency_scale, logical_specs

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 3.0}
# 6 heads of which 3 share their keys; or 5 that all do, with a head size that is not hidden / heads.
GROUPED = {
    "vocab_size": V,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
WIDE_HEADS = {**GROUPED, "hidden_size": 27, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}
SLIDING, FULL = "sliding_attention", "full_attention"
# Caps of the size of the logits, for a cap far above them changes nothing.
GEMMA2 = {
    **GROUPED,
    "head_dim": 10,
    "sliding_window": 4,
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.5,
}
BERT = {
    "vocab_size": V,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 17,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-rope": ("llama", {**GROUPED, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 50.0}}),
    "llama3-rope-v4": ("llama", {**GROUPED, "rope_scaling": LLAMA3_ROPE, "rope_theta": 50.0, "tie_word_embeddings": True}),
    "llama-linear-rope": ("llama", {**GROUPED, "rope_scaling": LINEAR_ROPE}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "mistral-tied": ("mistral", {**WIDE_HEADS, "sliding_window": 2, "tie_word_embeddings": True}),
    "mistral-window-covers": ("mistral", {**GROUPED, "sliding_window": S}),
    "mistral-no-window": ("mistral", {**GROUPED, "sliding_window": None, "rope_scaling": LINEAR_ROPE}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-late-window-tied": ("qwen2", {**GROUPED, **WINDOWED, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-listed": ("qwen2", {**GROUPED, **WINDOWED, "layer_types": [SLIDING, FULL]}),
    "qwen3": ("qwen3", WIDE_HEADS),
    "qwen3-biases": ("qwen3", {**GROUPED, "head_dim": 6, "attention_bias": True, "rms_norm_eps": 0.1}),
    "qwen3-window-tied": (
        "qwen3",
        {**GROUPED, "head_dim": 8, **WINDOWED, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {**GROUPED, "num_key_value_heads": 3}),
    "phi3-window-tied": ("phi3", {**GROUPED, "sliding_window": 6, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-untied-biases": ("gemma2", {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2-uncapped": (
        "gemma2",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [FULL, SLIDING]},
    ),
    "gemma2-norm-eps": ("gemma2", {**GEMMA2, "num_key_value_heads": 6, "rms_norm_eps": 0.1, "hidden_activation": "silu"}),
    "bert": ("bert", BERT),
    "bert-types": ("bert", {**BERT, "type_vocab_size": 5, "num_hidden_layers": 1}),
    "bert-norm-eps": ("bert", {**BERT, "layer_norm_eps": 0.1, "hidden_act": "gelu_new", "num_attention_heads": 3}),
}
ONE_OF_EACH = ["llama3-rope", "mistral", "qwen2-listed", "qwen3-window-tied", "phi3-window-tied", "gemma2", "bert"]
PACKED = ((13,), (4, 9), (1, 7, 5))


def their_class(family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].architecture)


def random_model(family: str, shape: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model in fp32 with every weight drawn at random around 0, those of norms around the factor 1."""
    from transformers import CONFIG_MAPPING

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = CONFIG_MAPPING[family](**shape, **tokens)
    model = their_class(family)(config).eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(float(is_norm and family != "gemma2"), 0.2, generator=stream)
    return model


def twins(name: str, folder: Path) -> tuple[Any, Stage]:
    theirs = random_model(*MODELS[name])
    theirs.save_pretrained(folder)
    return theirs, stage_from(folder)


def targets(family: str, tokens_BS: Tensor, lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    """What the family predicts: the next tokens, or any at random places, here about a third of all."""
    if FAMILIES[family].causal:
        return next_labels(tokens_BS, lengths)
    stream = torch.Generator().manual_seed(7)
    labels = torch.randint(0, V, tokens_BS.shape, generator=stream)
    return labels.masked_fill(torch.rand(tokens_BS.shape, generator=stream) > 0.35, IGNORE)


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = twins(name, tmp_path)
    tokens = random_tokens()
    documents = Documents.whole_rows(B, S)
    labels = targets(ours.config.family, tokens, documents.lengths)
    # Takes the mean itself, and with a causal model it shifts the labels.
    expected = theirs(input_ids=tokens, labels=tokens if ours.config.causal else labels)
    assert_close(
        ours(tokens, batch=MicroBatch(tokens, documents), output="logits").detach(), expected.logits.detach(), 1e-5, "logits"
    )
    loss = ours(tokens, batch=MicroBatch(tokens, documents, labels)) / (labels != IGNORE).sum()
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_each_document_alone(name: str, tmp_path: Path) -> None:
    theirs, ours = twins(name, tmp_path)
    tokens = random_tokens()
    labels = targets(ours.config.family, tokens, PACKED)
    logits = ours(tokens, batch=MicroBatch(tokens, Documents(PACKED)), output="logits")
    loss_sum = ours(tokens, batch=MicroBatch(tokens, Documents(PACKED), labels))
    expected_sum = torch.zeros(())
    for row, lengths in enumerate(PACKED):
        for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            expected = theirs(input_ids=tokens[row : row + 1, start:end]).logits
            got = logits[row : row + 1, start:end].detach()
            assert_close(got, expected.detach(), 1e-5, f"logits of row {row} from {start}")
            expected_sum = expected_sum + nn.functional.cross_entropy(
                expected[0], labels[row, start:end], ignore_index=IGNORE, reduction="sum"
            )
    torch.testing.assert_close(loss_sum, expected_sum, rtol=1e-6, atol=1e-5)
    num_targets = (labels != IGNORE).sum()
    (loss_sum / num_targets).backward()
    (expected_sum / num_targets).backward()
    assert_same_gradients(ours, theirs, 1e-5)


def test_bert_in_float64_equals_transformers(tmp_path: Path) -> None:
    """Nothing in it is computed in fp32 whatever the format, so that only rounding in float64 is left."""
    random_model("bert", BERT).save_pretrained(tmp_path)
    theirs, ours = random_model("bert", BERT).double(), stage_from(tmp_path, dtype=torch.float64).double()
    tokens, documents = random_tokens(), Documents.whole_rows(B, S)
    labels = targets("bert", tokens, documents.lengths)
    expected = theirs(input_ids=tokens, labels=labels)
    assert_close(ours(tokens, batch=MicroBatch(tokens, documents), output="logits"), expected.logits, 1e-12, "logits")
    expected.loss.backward()
    (ours(tokens, batch=MicroBatch(tokens, documents, labels)) / (labels != IGNORE).sum()).backward()
    assert_same_gradients(ours, theirs, 1e-12)


def test_both_sides_of_a_token_count_and_no_other_document_does(tmp_path: Path) -> None:
    _, ours = twins("bert", tmp_path)
    tokens, (first, second) = random_tokens(), PACKED[1]
    other = tokens.clone()
    other[1, first + 3] = (other[1, first + 3] + 7) % V
    with torch.no_grad():
        before, after = (ours(x, batch=MicroBatch(x, Documents(PACKED)), output="logits") for x in (tokens, other))
    changed = (before != after).any(-1)
    assert changed[1, first:].all(), "a token before or after the changed one did not see it"
    assert changed.sum() == second, "a token of another document saw it"


def test_without_pairs_only_the_first_token_type_learns(tmp_path: Path) -> None:
    _, ours = twins("bert-types", tmp_path)
    tokens = random_tokens()
    ours(tokens, batch=MicroBatch(tokens, Documents(PACKED), targets("bert", tokens, PACKED))).backward()
    gradient = logical_gradients(ours)["bert.embeddings.token_type_embeddings.weight"]
    assert gradient.any(1).tolist() == [True, False, False, False, False]


def test_bert_drops_where_transformers_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls dropout place after place in the order of the network; each call is given our mask of the place."""
    config = {**BERT, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    theirs = random_model("bert", config)
    theirs.set_attn_implementation("eager")  # whose dropout of weights is a call of its own
    theirs.train().save_pretrained(tmp_path)
    ours = stage_from(tmp_path)
    streams, cpu = Streams((5, 6, 7)), torch.device("cpu")
    names = names_of(ours.config)
    in_a_layer = (f"{names.attention_out}.weights", names.attention_out, names.mlp_out)
    sites = iter([names.embedding, *(site.format(layer=layer) for layer in range(2) for site in in_a_layer)])

    def given(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        site = next(sites)
        assert p == (0.2 if site.endswith(".weights") else 0.3)
        if x.dim() == 4:
            keeps = streams.keeps_weights(site, p, range(B), range(6), (S, S), 0, cpu)
        else:
            keeps = streams.keeps_features(site, p, (S, x.shape[-1]), slice(0, B * S), cpu).view_as(x)
        return x * keeps / (1 - p)

    monkeypatch.setattr(nn.functional, "dropout", given)
    tokens, documents = random_tokens(), Documents.whole_rows(B, S)
    labels = targets("bert", tokens, documents.lengths)
    expected = theirs(input_ids=tokens, labels=labels)
    assert next(sites, None) is None, "transformers drops in fewer places"
    expected.loss.backward()
    (ours(tokens, batch=MicroBatch(tokens, documents, labels, streams=streams)) / (labels != IGNORE).sum()).backward()
    assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_recompute_changes_no_bit(name: str, tmp_path: Path) -> None:
    random_model(*MODELS[name]).save_pretrained(tmp_path)
    tokens = random_tokens()
    seen = []
    for recompute in ("none", "full"):
        ours = stage_from(tmp_path, recompute=recompute)
        loss = ours(tokens, batch=MicroBatch(tokens, Documents(PACKED), targets(ours.config.family, tokens, PACKED)))
        loss.backward()
        seen.append((loss.detach(), logical_gradients(ours)))
    assert torch.equal(seen[0][0], seen[1][0])
    for weight, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][weight]), weight


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    """What we write is what transformers wrote: the same tensors bit by bit, and a config that means the same."""
    theirs, ours = twins(name, tmp_path / "theirs")
    config = to_hf(ours.config, dtype="float32", eos_token_id=None)
    tensors = ((spec, parameter.detach()) for _, parameter, spec in owned_specs(ours))
    write_folder(tensors, tmp_path / "ours", dtype=torch.float32, config=config, save_beside=lambda folder: None)

    written, original = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[weight]) for weight, tensor in written.items())
    loaded, report = their_class(ours.config.family).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
    for side in ("ours", "theirs"):
        hf_config = read_config(tmp_path / side)
        assert from_hf(hf_config["model_type"], hf_config) == ours.config
    specs = logical_specs(ours.config)
    PretrainedWeights(tmp_path / "ours").check_names(specs, ties=names_of(ours.config).ties(specs))


@pytest.mark.parametrize("original_positions", [16, 512, 8192])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LINEAR_ROPE, LLAMA3_ROPE])
def test_rotary_angles_are_those_of_transformers_to_the_bit(
    rope: dict[str, Any], theta: float, head_dim: int, original_positions: int
) -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    if rope["rope_type"] == "llama3":
        rope = {**rope, "original_max_position_embeddings": original_positions}
    shape = {
        "head_dim": head_dim,
        "max_position_embeddings": 2 * original_positions,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
    config = from_hf("llama", shape)
    positions = torch.arange(0, 2 * original_positions, max(1, original_positions // 61)).unsqueeze(0)
    expected = LlamaRotaryEmbedding(LlamaConfig(**shape))(torch.zeros(()), positions)
    scale = _frequency_scale(config.rope_scaling)
    got = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float32, scale)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.squeeze(2), theirs[..., : head_dim // 2])


# --- windows and soft caps, against one masked softmax over the whole row ----------------------------------------------


def plain_attention(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents: Documents, *, window: int, scale: float, softcap: float | None
) -> Tensor:
    share = q_BSHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (x.repeat_interleave(share, dim=2) for x in (k_BSGK, v_BSGK))
    logits = torch.einsum("bshk,bthk->bhst", q_BSHK, k_BSHK) * scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    place = torch.arange(q_BSHK.shape[1])
    age = place.unsqueeze(1) - place
    document = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents.lengths])
    visible = (age >= 0) & (age < window) & (document.unsqueeze(2) == document.unsqueeze(1))
    return torch.einsum("bhst,bthk->bshk", logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1), v_BSHK)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 12, 13, 14, 100])
@pytest.mark.parametrize("block", [1, 3, 4, 512])
def test_attention_in_blocks_is_exact(block: int, window: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    stream = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 13, heads, 6, generator=stream, dtype=torch.float64) for heads in (6, 2, 2)]
    upstream = torch.randn(3, 13, 6, 6, generator=stream, dtype=torch.float64)
    outcomes = []
    for function, more in ((attend, {"causal": True}), (plain_attention, {})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, Documents(PACKED), window=window, scale=0.9, softcap=softcap, **more)
        out.backward(upstream)
        outcomes.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "masks"), [(None, 0), (100, 0), (13, 0), (9, 1), (8, 2), (4, 4), (3, 5)])
def test_a_window_that_covers_the_document_makes_no_mask(
    window: int | None, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PACKED holds documents of 13, 4, 9, 1, 7 and 5 tokens; those longer than the window need a mask each."""
    made: list[Tensor | None] = []
    original = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda *args: made.append(original(*args)) or made[-1])
    q, k, v = (torch.randn(3, 13, 2, 4) for _ in range(3))
    attend(q, k, v, Documents(PACKED), causal=True, window=window)
    assert len(made) == masks


def test_dropout_acts_on_windowed_and_capped_attention() -> None:
    """With V = 1 a row of the output is the sum of what dropout kept of it, doubled: its mean over many is 1."""
    q, k = (torch.randn(1, 400, 8, 4) for _ in range(2))
    half = WeightDropout(rate=0.5, streams=Streams((1,)), site="here", heads=range(8))
    for options in ({}, {"window": 50}, {"softcap": 2.0}, {"softcap": 2.0, "window": 50}):
        out = attend(q, k, torch.ones(1, 400, 8, 4), Documents(((400,),)), causal=True, dropout=half, **options)
        assert out.std() > 0.1
        assert abs(out.mean() - 1.0) < 0.05


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [None, "b"])
def test_cross_entropy_has_the_gradients_of_its_formula(
    bias: str | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, with positions that are no targets."""
    monkeypatch.setattr("parallel.loss.CHUNK_BYTES", 4 * 37 * 4)
    monkeypatch.setattr("parallel.loss.TOKENS_PER_FEATURE", 0)
    alone = TensorParallel.alone()
    head = VocabParallelHead(37, 12, name="h", init=Init(std=0.5), tp=alone, tied_to=None, bias=bias, softcap=softcap)
    initialise(head, seed=1)
    head.double()
    if head.bias is not None:
        nn.init.normal_(head.bias)  # 0 would hide it
    hidden = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (3, 7))
    labels[0, 3] = labels[2, 6] = IGNORE
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    logits = logits if softcap is None else soft_cap(logits, softcap)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    inputs = (hidden, *head.parameters())
    got = head.loss_sum(hidden.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(head.logits(hidden.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    expected_N = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    got_N = head.token_losses(hidden.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got_N, expected_N, rtol=1e-12, atol=1e-12)
    of_each = torch.randn(21, dtype=torch.float64)
    for ours, theirs in (
        *zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs, retain_graph=True), strict=True),
        *zip(torch.autograd.grad(got_N, inputs, of_each), torch.autograd.grad(expected_N, inputs, of_each), strict=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_evaluation_counts_labels_with_the_highest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks; of equal logits the lowest id counts, and what is no target does not."""
    monkeypatch.setattr("parallel.loss.CHUNK_BYTES", 4 * 37 * 4)
    monkeypatch.setattr("parallel.loss.TOKENS_PER_FEATURE", 0)
    head = VocabParallelHead(37, 12, name="h", init=Init(std=0.5), tp=TensorParallel.alone(), tied_to=None, softcap=2.0)
    initialise(head, seed=1)
    head.double()
    with torch.no_grad():
        head.weight[20] = head.weight[5]
    hidden = torch.randn(15, 12, dtype=torch.float64)
    hidden[0] = 4 * head.weight[5].detach() / head.weight[5].norm()
    guesses = head.logits(hidden).argmax(-1)
    labels = guesses.clone()
    labels[1::3] = (labels[1::3] + 1) % 37
    labels[2::3] = IGNORE
    losses_N, hits_N = head.losses_and_hits(hidden, labels)
    assert torch.equal(hits_N, (guesses == labels).double())
    assert losses_N[2::3].abs().max() == 0
    assert losses_N.sum().item() == pytest.approx(head.loss_sum(hidden, labels).item(), rel=1e-12)
    assert guesses[0] == 5, "the two rows must tie for the highest"
    for label, right in ((5, 1), (20, 0)):
        assert head.losses_and_hits(hidden[:1], torch.tensor([label]))[1] == right


def test_an_offset_norm_in_bf16_keeps_small_weights() -> None:
    """1 + 0.001 in bf16 is 1: the offset is added in fp32."""
    layer = RMSNorm(64, eps=1e-6, name="n", tp=TensorParallel.alone(), offset=1.0)
    nn.init.constant_(layer.weight, 0.003)
    x = torch.randn(500, 64).bfloat16()
    plain = nn.functional.rms_norm(x.float(), (64,), eps=1e-6)
    ratio = (layer(x).float() * plain).sum() / plain.square().sum()
    assert abs(ratio.item() - 1.003) < 5e-4


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_norms_start_at_the_factor_one(family: str) -> None:
    config = from_hf(family, {**GROUPED, "head_dim": 6})
    stage = Stage(
        config,
        blocks_of(config),
        dtype=torch.float32,
        recompute="none",
        tp=TensorParallel.alone(),
        device=torch.device("cpu"),
        fill=lambda block: initialise(block, 0),
    )
    norms = [module for module in stage.modules() if isinstance(module, RMSNorm | QueryKeyNorm)]
    assert len(norms) == (4 if family == "gemma2" else 3) * config.num_layers + 1
    for module in norms:
        for parameter in module.parameters():
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 - config.norm_offset))


# --- over tensor ranks ---------------------------------------------------------------------------------------------------

# 36 tokens: four shares of 9 that begin and end inside a row and inside a document.
ON_TENSOR_RANKS_PACKED = ((12,), (4, 8), (1, 6, 5))
# Heads, key/value heads and ffn divide by 4; the vocabulary of 67 does not. "shared": fewer key/value heads than ranks.
DIVIDED = {**GROUPED, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
ON_TENSOR_RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**DIVIDED, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 50.0}}),
    "mistral": ("mistral", {**DIVIDED, "head_dim": 6, "sliding_window": 4, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**DIVIDED, **WINDOWED, "layer_types": [SLIDING, FULL]}),
    "qwen3": ("qwen3", {**DIVIDED, **WINDOWED, "head_dim": 6, "attention_bias": True, "max_window_layers": 1}),
    "phi3": ("phi3", {**DIVIDED, "sliding_window": 6}),
    "gemma2": ("gemma2", {**GEMMA2, **DIVIDED, "head_dim": 6, "attention_bias": True}),
    "gemma2-untied": ("gemma2", {**GEMMA2, **DIVIDED, "head_dim": 6, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "llama-shared": ("llama", {**DIVIDED, "num_key_value_heads": 2}),
    "qwen2-shared": ("qwen2", {**DIVIDED, "num_key_value_heads": 2}),
    "qwen3-shared": ("qwen3", {**DIVIDED, "num_key_value_heads": 1, "head_dim": 6}),
    "phi3-shared": ("phi3", {**DIVIDED, "num_key_value_heads": 1}),
    "bert": ("bert", {**BERT, "hidden_size": 32, "num_attention_heads": 4, "type_vocab_size": 3}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, model in ON_TENSOR_RANKS.items():
        random_model(*model).save_pretrained(root / name)
    return {name: root / name for name in ON_TENSOR_RANKS}


def shard_from(folder: Path, tp: TensorParallel, dtype: torch.dtype) -> Stage:
    """This rank's part of the model, read from the folder by slices."""
    hf_config = read_config(folder)
    config = from_hf(hf_config["model_type"], hf_config)
    stage = Stage(
        config,
        blocks_of(config),
        dtype=dtype,
        recompute="none",
        tp=tp,
        device=torch.device("cpu"),
        fill=PretrainedWeights(folder).fill,
    )
    return stage.to(dtype)


def differences(mesh: Mesh, folder: Path, dtype: torch.dtype, *, sequence: bool = True) -> dict[str, float]:
    """How far the loss and each gradient are from the one-process run, relative to the largest element."""
    tokens = random_tokens()[:, :12]
    documents = Documents(ON_TENSOR_RANKS_PACKED)
    labels = targets(read_config(folder)["model_type"], tokens, documents.lengths)
    ways = (TensorParallel.alone(), TensorParallel(mesh.tp, sequence=sequence))
    stages = [shard_from(folder, tp, dtype) for tp in ways]
    losses = [stage(tokens, batch=MicroBatch(tokens, documents, labels)) for stage in stages]
    for loss in losses:
        (loss / loss.detach()).backward()
    logical = logical_gradients(stages[0])
    found = {"loss": float((losses[1].detach() / losses[0].detach() - 1.0).abs())}
    for name, parameter, spec in owned_specs(stages[1]):
        covered = 0
        for piece in spec.pieces:
            expected = logical[piece.name]
            difference = piece.in_parameter(parameter.grad) - piece.box_of(expected)
            worst = difference.abs().max() if difference.numel() else torch.zeros(())
            found[f"{name} ({piece.name})"] = float(worst) / largest_element(logical, piece.name)
            covered += piece.rows
        assert not parameter.grad[covered:].any(), f"padding rows of {name} got a gradient"
    return found


@pytest.mark.parametrize("rank", range(4))
def test_padding_of_the_vocabulary_is_0_and_not_what_lay_in_memory(
    rank: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """67 symbols are 4 · 17 rows: the last rank has one that no tensor fills."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full(tensor.shape, torch.nan, **options))
    group = Group(rank=rank, ranks=(0, 1, 2, 3), handle=None)
    stage = shard_from(folders["gemma2-untied"], TensorParallel(group, sequence=False), torch.float32)
    assert stage.head is not None
    bert = shard_from(folders["bert"], TensorParallel(group, sequence=False), torch.float32)
    for weight in (stage.embedding.tokens.weight, stage.head.output.weight, bert.head.output.bias):
        assert torch.isfinite(weight).all()
        assert bool(weight[-1].any()) == (rank < 3)


def equal_to_one_process(mesh: Mesh, folders: dict[str, Path], dtype: torch.dtype, tolerance: float) -> None:
    for model, folder in folders.items():
        for sequence in (False, True):
            found = differences(mesh, folder, dtype, sequence=sequence)
            wrong = {name: x for name, x in found.items() if not x <= tolerance}
            how = f"{mesh.tp.size} tensor ranks, sequence parallelism {'on' if sequence else 'off'}"
            assert not wrong, f"{model} on {how}: {json.dumps(wrong, indent=1)}"


@pytest.mark.parametrize(
    ("dtype", "tolerance", "tp"),
    [
        (torch.float32, 1e-5, 2),
        (torch.float64, 1e-12, 4),
        pytest.param(torch.float32, 1e-5, 4, marks=pytest.mark.grid),
        pytest.param(torch.float64, 1e-12, 2, marks=pytest.mark.grid),
    ],
)
def test_tensor_ranks_equal_one_process(dtype: torch.dtype, tolerance: float, tp: int, folders: dict[str, Path]) -> None:
    spawn(equal_to_one_process, Layout(tp=tp), folders, dtype, tolerance)


def without_the_sum(mesh: Mesh, folder: Path, sequence: bool) -> set[str]:
    transformer.complete_partial_gradients = lambda block: None
    found = differences(mesh, folder, torch.float64, sequence=sequence)
    return {name for name, x in found.items() if x > 1e-6}


def test_without_the_sum_over_tensor_ranks_the_gradients_of_head_norms_are_partial(folders: dict[str, Path]) -> None:
    """The test above can fail: the weights of q and k norms, and nothing else, see only the local heads."""
    expected = {
        f"layers.{layer}.attention.qk_norm.{what} (model.layers.{layer}.self_attn.{letter}_norm.weight)"
        for layer in range(2)
        for what, letter in (("query", "q"), ("key", "k"))
    }
    for partial in spawn(without_the_sum, Layout(tp=2), folders["qwen3"], False):
        assert partial == expected


def test_without_the_sum_over_tensor_ranks_what_bert_has_whole_sees_its_tokens_only(folders: dict[str, Path]) -> None:
    """Under sequence parallelism: tables, norms, the biases of row-parallel layers and the head's transform."""
    layer = ("attention.out", "attention_residual_norm", "mlp.down", "mlp_residual_norm")
    whole = {f"layers.{index}.{name}.{what}" for index in range(2) for name in layer for what in ("weight", "bias")}
    whole -= {f"layers.{index}.{name}.weight" for index in range(2) for name in ("attention.out", "mlp.down")}
    whole |= {f"head.transform.{name}.{what}" for name in ("dense", "norm") for what in ("weight", "bias")}
    whole |= {"embedding.positions.weight", "embedding.token_types.weight", "embedding.norm.weight", "embedding.norm.bias"}
    for partial in spawn(without_the_sum, Layout(tp=2), folders["bert"], True):
        assert {name.split()[0] for name in partial} == whole
