"""Family "auto": what goes in comes out again bit by bit, what it computes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.documents import Documents
from parallel.loss import IGNORE
from parallel.mesh import Group
from parallel.params import Role, ShardSpec, owned_specs
from parallel.rng import Streams
from tests.unit.oracle import assert_close, next_labels, random_tokens
from tests.unit.shapes import B, S, V
from trainer.costs.flops import training_flops
from trainer.data.loader import MicroBatch
from trainer.errors import DataError, RecipeError
from trainer.model.auto import open_auto
from trainer.model.auto_network import AutoNetwork
from trainer.model.auto_rotations import ORIGINAL
from trainer.model.auto_stage import AutoStage, cross_entropy_sum
from trainer.model.hugging_face import write_folder
from trainer.schema import Recipe

TINY = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT_NEOX = {"model_type": "gpt_neox", **TINY, "intermediate_size": 48, "max_position_embeddings": 32}
OPT = {"model_type": "opt", **TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
BLOOM = {"model_type": "bloom", "vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}
# Its activation has parameters, and buffers that belong to the checkpoint.
APERTUS = {"model_type": "apertus", **TINY, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
# A state-space model: no attention.
MAMBA = {"model_type": "mamba", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
# Weights that its own config freezes: sinusoids as an embedding.
PEGASUS = {
    "model_type": "pegasus",
    "vocab_size": V,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 0,
}
MIXTRAL = {
    **{"model_type": "mixtral", **TINY, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 32},
}
FALCON = {"model_type": "falcon", **TINY, "max_position_embeddings": 32}
MODELS = {c["model_type"]: c for c in (GPT_NEOX, OPT, BLOOM, APERTUS, MAMBA, PEGASUS, MIXTRAL, FALCON)}
TOKENIZER: Any = SimpleNamespace(vocab_size=V, end_of_document=0, bos=None)


def recipe(model: dict[str, Any], **sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"family": "auto", **model}, "data": {"seq_len": S}, **sections})


def from_scratch(config: dict[str, Any], **sections: Any) -> Recipe:
    return recipe({"config": config}, **sections)


def from_folder(folder: Path, **more: Any) -> Recipe:
    return recipe({"from_pretrained": str(folder), **more})


def stage_of(of: Recipe, *, recompute: Any = "none") -> tuple[AutoNetwork, AutoStage]:
    network, fill = open_auto(of, TOKENIZER)
    stage = AutoStage(network, dtype=torch.float32, recompute=recompute, device=torch.device("cpu"), fill=fill)
    return network, stage


def random_folder(config: dict[str, Any], folder: Path, **more: Any) -> Any:
    """A model of transformers with every weight and constant drawn at random, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **more}), dtype=torch.float32)
    stream = torch.Generator().manual_seed(0)
    persistent = [model.get_buffer(name) for name in model.state_dict() if name in dict(model.named_buffers())]
    with torch.no_grad():
        for tensor in [*model.parameters(), *persistent]:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=stream) + 1.0 * (tensor.dim() < 2))
    model.save_pretrained(folder)
    return model.eval()


def export(network: AutoNetwork, stage: AutoStage, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    def tensors() -> Iterator[tuple[ShardSpec, Tensor]]:
        yield from ((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage))
        yield from stage.constants

    config = network.config_json(str(dtype).removeprefix("torch."))
    write_folder(tensors(), folder, dtype=dtype, config=config, save_beside=network.save_code)


def load(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(loading.values()), loading
    return model.eval()


# ------------------------------------------------------------------------------------------------------- out and in


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_wrote_is_written_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    theirs = random_folder(MODELS[name], tmp_path / "theirs")
    network, stage = stage_of(from_folder(tmp_path / "theirs"))
    export(network, stage, tmp_path / "ours")
    if name != "mixtral":  # its files hold experts one by one; we write them as transformers holds them
        stored, written = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
        assert stored.keys() == written.keys()
        for tensor, values in stored.items():
            assert torch.equal(written[tensor], values), tensor
    again = load(tmp_path / "ours")
    for tensor, values in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[tensor], values), tensor
    ours, their_own = again.config.to_dict(), theirs.config.to_dict()
    assert {key for key in their_own if ours[key] != their_own[key]} <= {"_name_or_path", "is_decoder"}
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        # The same kernels on the same numbers: seen 0.
        assert_close(
            stage(tokens, batch=MicroBatch(tokens, Documents.whole_rows(B, S)), output="logits"), expected, 1e-6, "logits"
        )


@pytest.mark.parametrize("name", MODELS)
def test_drawn_weights_depend_on_the_seed_only(name: str) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    (_, first), (_, again), (_, other) = (
        stage_of(from_scratch(MODELS[name], run={"seed": seed}, train={"recompute": "none"})) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before), "nobody's random numbers may be used up"
    weights = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in weights)
    assert any(not torch.equal(a, c) for a, _, c in weights)
    assert all(a.isfinite().all() for a, _, _ in weights)


def test_a_fill_finds_no_storage_but_what_it_gives(tmp_path: Path) -> None:
    """Weights of a folder are read layer by layer: before that the model holds none, though its buffers are right."""
    random_folder(GPT_NEOX, tmp_path)
    network, fill = open_auto(from_folder(tmp_path), TOKENIZER)
    model = network.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    sizes: list[int] = []

    def watching(block: Any) -> None:
        sizes.append(len(list(block.parameters())))
        fill(block)

    AutoStage(network, dtype=torch.float32, recompute="none", device=torch.device("cpu"), fill=watching)
    assert sizes == [1, 12, 12, 2, 1], "embedding, two layers, final norm, head"


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    for name, config in {"direct": OPT, "converted": MIXTRAL}.items():
        random_folder(config, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        first = next(tensor for tensor in tensors if "layers.1" in tensor)
        save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"layers\.1.* holds NaN or infinity"):
            stage_of(from_folder(tmp_path / name))
        save_file({k: v for k, v in tensors.items() if k != first}, file, metadata={"format": "pt"})
        with pytest.raises(
            (DataError, RecipeError), match=r"missing keys: .*layers\.1" if name == "direct" else "conversion of"
        ):
            stage_of(from_folder(tmp_path / name))
        save_file({**tensors, "model.extra": torch.zeros(3)}, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"model\.extra"):
            stage_of(from_folder(tmp_path / name))


def test_a_second_copy_of_a_tied_weight_must_be_the_same(tmp_path: Path) -> None:
    random_folder(OPT, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    stage_of(from_folder(tmp_path))
    save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head\.weight differs from model\.decoder\.embed_tokens\.weight"):
        stage_of(from_folder(tmp_path))


# ------------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    _, stage = stage_of(from_scratch(MODELS[name]))
    lengths = ((5, S - 5), (S,), (1, 2, S - 3))[:B]
    packed = Documents(lengths + ((S,),) * (B - len(lengths)))
    tokens = random_tokens()
    labels = next_labels(tokens, packed.lengths)
    logits, loss = (
        stage(tokens, batch=MicroBatch(tokens, packed), output="logits"),
        stage(tokens, batch=MicroBatch(tokens, packed, labels)),
    )
    separate = [
        stage(document[None], batch=MicroBatch(document[None], Documents.whole_rows(1, len(document))), output="logits")
        for row, row_lengths in zip(tokens, packed.lengths, strict=True)
        for document in row.split(row_lengths)
    ]
    expected = torch.cat([document[0] for document in separate]).unflatten(0, (B, S))
    # Padded rows take part in other matrix products: seen 1e-6.
    assert_close(logits, expected, 1e-5, "logits")
    losses = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    assert_close(loss, losses, 1e-5, "loss")


def test_what_a_recipe_says_is_not_written_into() -> None:
    """transformers completes rope_parameters in place."""
    of = from_scratch(BY_LENGTH["longrope"])
    open_auto(of, TOKENIZER)
    assert of.model.config["rope_parameters"] == LONG


ROPE = {**TINY, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": None}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10.0, ORIGINAL: 6},
    **{"short_factor": [1.0, 1.5], "long_factor": [3.0, 9.0], "factor": 4.0},
}
BY_LENGTH: dict[str, dict[str, Any]] = {
    "longrope": {"model_type": "phi3", **ROPE, "max_position_embeddings": 24, ORIGINAL: 6, "rope_parameters": LONG},
    "dynamic": {
        **{"model_type": "llama", **ROPE, "max_position_embeddings": 6},
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 4.0},
    },
}


def by_length(kind: str, seed: int = 0, recompute: Any = "none") -> AutoStage:
    """A model whose rotations of a text of more than 6 tokens are others, with weights so large that it shows."""
    of = from_scratch(BY_LENGTH[kind], data={"seq_len": 6}, run={"seed": seed})
    _, stage = stage_of(of, recompute=recompute)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(20.0 if parameter.dim() > 1 else 1.0)
    return stage


def losses_of_transformers(kind: str, documents: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each document alone, by a model that has seen no other; and the gradient of their sum."""
    losses, gradients = [], {}
    for document in documents:
        theirs = by_length(kind).model
        for module in theirs.modules():
            vars(module).pop("forward", None)  # our own
        logits = theirs(input_ids=document[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
        losses[-1].backward()
        for name, parameter in theirs.named_parameters():
            gradients[name] = gradients.get(name, 0.0) + parameter.grad
    return torch.stack([loss.detach() for loss in losses]), gradients


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_document_is_the_same_beside_longer_ones(kind: str, recompute: str) -> None:
    """In every division into micro-batches, in any order, loss and gradient are those of each document alone."""
    lengths = ((13,), (6, 7), (2, 11), (3, 4, 6), (5, 8), (12, 1), (13,), (6, 6, 1))
    tokens = torch.randint(0, V, (len(lengths), 13), generator=torch.Generator().manual_seed(0))
    labels = next_labels(tokens, lengths)
    documents = [part for row, parts in zip(tokens, lengths, strict=True) for part in row.split(parts)]
    expected, gradients = losses_of_transformers(kind, [document for document in documents if len(document) > 1])
    for rows in (8, 2, 1):
        stage = by_length(kind, recompute=recompute)
        cuts = [slice(at, at + rows) for at in range(0, 8, rows)]
        losses = torch.stack(
            [
                stage(
                    tokens[c],
                    batch=MicroBatch(tokens[c], Documents(lengths[c]), labels[c], streams=Streams.of_step(0, 0, range(rows))),
                )
                for c in cuts
            ]
        )
        # Sums of products in another order: seen 3e-6.
        assert_close(losses.sum(), expected.sum(), 1e-5, f"loss by {rows}")
        losses.sum().backward()
        for name, parameter in stage.model.named_parameters():
            assert_close(parameter.grad, gradients[name], 1e-4, f"gradient of {name} by {rows}")
    without = by_length(kind)
    for module in without.model.modules():
        vars(module).pop("forward", None)
    wrong = without(tokens, batch=MicroBatch(tokens, Documents(lengths), labels))
    assert abs(float((wrong - expected.sum()).detach())) > 1e-3 * float(expected.sum()), "the test must be able to see it"


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_measures_do_not_depend_on_the_longest_either(kind: str) -> None:
    stage, tokens = by_length(kind), torch.arange(26).view(2, 13) % V
    packed = Documents(((13,), (4, 9)))
    scores = stage(tokens, batch=MicroBatch(tokens, packed, next_labels(tokens, packed.lengths)), output="scores")
    for number, document in enumerate((tokens[0], tokens[1, :4], tokens[1, 4:])):
        alone = Documents.whole_rows(1, len(document))
        found = stage(
            document[None], batch=MicroBatch(document[None], alone, next_labels(document[None], alone.lengths)), output="scores"
        )
        assert_close(found[0, 0], scores[0, number], 1e-5, "log-probability")


def test_a_model_that_looks_at_the_longest_is_called_for_each_length() -> None:
    _, stage = stage_of(from_scratch(GPT_NEOX))
    assert stage.settle_lengths(torch.device("cpu"), S, may_call_apart=False) == []
    real = stage.model.gpt_neox.embed_in.forward
    stage.model.gpt_neox.embed_in.forward = lambda ids: real(ids) * ids.shape[1] ** 0.5
    with pytest.raises(RecipeError, match=r"depend on the longest document of its call.*zero.stage of at most 2"):
        stage.settle_lengths(torch.device("cpu"), S, may_call_apart=False)
    (said,) = stage.settle_lengths(torch.device("cpu"), S, may_call_apart=True)
    assert "those of each length have a call of their own" in said
    tokens, packed = random_tokens(), Documents(((S,), (5, S - 5), (5, 4, S - 9))[:B] + ((S,),) * (B - 3))
    expected = [
        stage(document[None], batch=MicroBatch(document[None], Documents.whole_rows(1, len(document))), output="logits")[0]
        for row, row_lengths in zip(tokens, packed.lengths, strict=True)
        for document in row.split(row_lengths)
    ]
    assert_close(
        stage(tokens, batch=MicroBatch(tokens, packed), output="logits"),
        torch.cat(expected).unflatten(0, (B, S)),
        1e-5,
        "logits",
    )


@pytest.mark.parametrize("name", [*MODELS, *BY_LENGTH])
def test_these_models_do_not_look_at_the_longest(name: str) -> None:
    stage = by_length(name) if name in BY_LENGTH else stage_of(from_scratch(MODELS[name]))[1]
    assert stage.settle_lengths(torch.device("cpu"), S, may_call_apart=False) == []


def test_the_loss_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, V, generator=stream, requires_grad=True)
    labels = torch.randint(0, V, (2, 7), generator=stream)
    labels[0, 3:] = IGNORE
    whole = cross_entropy_sum(logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr("trainer.model.auto_stage.CHUNK_BYTES", 4 * V * 3)
    chunked = cross_entropy_sum(logits, labels)
    (gradient,) = torch.autograd.grad(chunked, logits)
    assert_close(chunked, whole, 1e-6, "loss")
    assert torch.equal(gradient, expected)
    nothing = cross_entropy_sum(logits, torch.full_like(labels, IGNORE))
    assert float(nothing.detach()) == 0.0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_dropout_follows_the_stream_and_nothing_else() -> None:
    _, stage = stage_of(from_scratch({**GPT_NEOX, "hidden_dropout": 0.5}))
    tokens, documents = random_tokens(), Documents.whole_rows(B, S)
    one, two = (Streams.of_step(0, step, range(B)) for step in (1, 2))
    before = torch.get_rng_state()
    first, again, other = (
        stage(tokens, batch=MicroBatch(tokens, documents, tokens, streams=streams)).detach() for streams in (one, one, two)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(
        stage(tokens, batch=MicroBatch(tokens, documents), output="logits"),
        stage(tokens, batch=MicroBatch(tokens, documents), output="logits"),
    ), "no stream, no dropout"
    assert torch.equal(torch.get_rng_state(), before)


def test_roles_follow_the_kind_of_module() -> None:
    _, stage = stage_of(from_scratch(OPT))
    roles = {name.removeprefix("model.model.decoder."): spec.role for name, _, spec in owned_specs(stage)}
    assert roles["embed_tokens.weight"] is Role.EMBEDDING
    assert roles["embed_positions.weight"] is Role.EMBEDDING
    assert roles["layers.0.fc1.weight"] is Role.MATRIX
    assert roles["layers.0.fc1.bias"] is Role.BIAS
    assert roles["layers.0.final_layer_norm.weight"] is Role.NORM
    assert "model.lm_head.weight" not in roles, "a tied head is counted once"
    assert all(spec.copies == Group.alone() for _, _, spec in owned_specs(stage))


@pytest.mark.parametrize("config", [GPT_NEOX, OPT, BLOOM], ids=lambda config: config["model_type"])
def test_flops_are_those_that_torch_counts_with_attention_at_half(config: dict[str, Any]) -> None:
    network, stage = stage_of(from_scratch(config))
    tokens = random_tokens()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        stage(
            tokens, batch=MicroBatch(tokens, Documents.whole_rows(B, S), tokens, streams=Streams.of_step(0, 0, range(B)))
        ).backward()
    half_of_attention = 6 * network.attention_width * B * S * S
    # Rotary tables and slopes are small matrix products too: seen 0.3 %.
    assert training_flops(network, [S] * B) + half_of_attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_experts_are_those_that_a_token_is_sent_to() -> None:
    network, _ = stage_of(from_scratch(MIXTRAL))
    D, F, heads, kv = 32, 48, 4, 2
    attention = 2 * D * D + 2 * D * D * kv // heads
    per_layer = attention + D * 4 + 2 * 3 * D * F  # the router's 4 rows, and 2 of 4 experts
    assert network.matmul_weights == 2 * per_layer + V * D
    network, _ = stage_of(from_scratch(MAMBA))
    assert network.attention_width == 0


def test_a_bert_predicts_as_a_decoder() -> None:
    """transformers gives a bidirectional model for this Auto class unless its config says is_decoder."""
    bert = {"model_type": "bert", **TINY, "intermediate_size": 48, "max_position_embeddings": 32}
    network, stage = stage_of(from_scratch(bert))
    assert not stage.looks_ahead(torch.device("cpu"))
    assert network.config_json("float32")["is_decoder"] is True
    stage.model.config.is_decoder = False
    for module in stage.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
        if hasattr(module, "config"):
            module.config.is_decoder = False
    assert stage.looks_ahead(torch.device("cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_these_models_do_not_look_ahead(name: str) -> None:
    _, stage = stage_of(from_scratch(MODELS[name]))
    assert not stage.looks_ahead(torch.device("cpu"))


def test_xlnet_looks_ahead() -> None:
    _, stage = stage_of(from_scratch({"model_type": "xlnet", "vocab_size": V, "d_model": 32, "n_layer": 1, "n_head": 4}))
    assert stage.looks_ahead(torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**GPT_NEOX, "hiden_size": 64}, "model.config.hiden_size: GPTNeoXConfig has no such key; did you mean hidden_size?"),
        ({**GPT_NEOX, "top_k": 5}, "model.config.top_k: GPTNeoXConfig has no such key"),
        ({**GPT_NEOX, "model_type": "gpt_neo_x"}, "model_type gpt_neo_x"),
        ({**GPT_NEOX, "num_attention_heads": 5}, "hidden size is not divisible"),
        ({**GPT_NEOX, "hidden_size": "32"}, "hidden_size"),
        ({"model_type": "vit"}, "(model_type vit): transformers cannot make a AutoModelForCausalLM of it"),
        ({"model_type": "t5", "vocab_size": V}, "AutoModelForCausalLM"),
        ({**OPT, "layerdrop": 0.1}, "layerdrop = 0.1: ranks would drop different layers"),
        ({**MIXTRAL, "output_router_logits": True}, "auxiliary loss is not trained here"),
        ({**GPT_NEOX, "vocab_size": V - 1}, f"vocab_size = {V - 1} is less than the tokenizer's {V} symbols"),
        ({**GPT_NEOX, "max_position_embeddings": S - 1}, f"max_position_embeddings = {S - 1} is less than data.seq_len"),
    ],
)
def test_a_config_that_cannot_be_trained_is_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        open_auto(from_scratch(config), TOKENIZER)
    assert len(error.value.lines) == 1
    assert said in error.value.lines[0]


def test_legal_keys_of_older_configs_pass() -> None:
    network, _ = stage_of(from_scratch({**GPT_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 50.0}))
    assert network.hf_config.rope_parameters["rope_theta"] == 50.0


def test_only_dropout_changes_what_a_folder_says(tmp_path: Path) -> None:
    random_folder(GPT_NEOX, tmp_path)
    network, _ = stage_of(from_folder(tmp_path, config={"hidden_dropout": 0.3}))
    assert network.hf_config.hidden_dropout == 0.3
    with pytest.raises(RecipeError, match=r"residual_dropout: GPTNeoXConfig has no such key"):
        open_auto(from_folder(tmp_path, config={"residual_dropout": 0.3}), TOKENIZER)


def test_a_model_that_cannot_recompute_says_so() -> None:
    config = {"model_type": "xlnet", "vocab_size": V, "d_model": 32, "n_layer": 1, "n_head": 4}
    with pytest.raises(RecipeError, match=r'train.recompute = "full": XLNetLMHeadModel cannot recompute'):
        open_auto(from_scratch(config, train={"recompute": "full"}), TOKENIZER)


# ------------------------------------------------------------------------------------------------------- a folder's code

CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny_custom"

    def __init__(self, vocab_size=5, hidden_size=4, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_tiny import TinyConfig

class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.head(self.embedding(input_ids).cumsum(1)))
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that brings its own model; what transformers copies of it goes to a place of the test's own."""
    modules = tmp_path / "modules"
    for owner in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
        monkeypatch.setattr(f"{owner}.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    folder = tmp_path / "custom"
    folder.mkdir()
    code = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config = {"model_type": "tiny_custom", "vocab_size": V, "hidden_size": 8, "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    stream = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(V, 8, generator=stream) for name in ("embedding.weight", "head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_folders_code_runs_only_when_trusted(custom: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has auto_map: the folder brings Python code.*legal: model.trust_remote_code true"):
        open_auto(from_folder(custom), TOKENIZER)
    assert not (tmp_path / "modules").exists(), "nothing of it was copied, so nothing ran"
    network, stage = stage_of(from_folder(custom, trust_remote_code=True))
    tokens = random_tokens()
    lengths = ((S - 3, 3),) * B
    loss = stage(tokens, batch=MicroBatch(tokens, Documents(lengths), tokens, streams=Streams.of_step(0, 0, range(B))))
    loss.backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())
    export(network, stage, tmp_path / "ours")
    again = load(tmp_path / "ours", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(
            again(tokens).logits, stage(tokens, batch=MicroBatch(tokens, Documents.whole_rows(B, S)), output="logits")
        )


def test_code_from_another_repository_is_refused(custom: Path) -> None:
    config = json.loads((custom / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "somebody/else--configuration_tiny.TinyConfig"
    (custom / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"takes code from another repository"):
        open_auto(from_folder(custom, trust_remote_code=True), TOKENIZER)
