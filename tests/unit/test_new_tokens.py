"""New tokens without ranks: what a text that spells them becomes, the rows that they get, and how these leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from parallel.documents import Documents
from parallel.embedding import VocabParallelEmbedding
from parallel.loss import IGNORE, VocabParallelHead
from parallel.params import Init, initialise, owned_specs
from parallel.tensor import TensorParallel
from tests.unit.stages import whole_model
from trainer.checkpoint.facts import recipe_facts, refusals
from trainer.data.chat import Chat
from trainer.data.conversations import Conversation, Message
from trainer.data.loader import MicroBatch
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer, make_tokenizer, train_bpe
from trainer.engine.parameter_counts import ParameterCounts
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf, to_hf
from trainer.model.hugging_face import PretrainedWeights, assembled
from trainer.model.new_tokens import grown, growth_findings, new_token_findings, number_at_the_end, require_rows, stand_ins
from trainer.schema import Recipe, Tuning
from trainer.tuning.adapter_folder import AdapterFormat
from trainer.tuning.bottleneck_format import load_bottlenecks
from trainer.tuning.merge import merged
from trainer.tuning.targets import is_added, token_rows

# peft 0.21 asks transformers 5 by a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning"),
    # It means embedding and head, which are saved alike.
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
    ),
]

NEW = ["<|tool|>", "<|end|>"]
ROWS, SIZE = 61, 67  # of a folder, and of the model that grew from it
TOKENS = (3, 61, 62, 63, 64, 65, 66)
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

# ------------------------------------------------------------------------------------------------ tokenizers


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_a_text_that_spells_a_new_token_means_it_and_no_other_special_one() -> None:
    tokenizer = make_tokenizer("bytes").with_new_tokens(NEW)
    assert tokenizer.ids_of(NEW) == {"<|tool|>": 257, "<|end|>": 258}
    assert tokenizer.vocab_size == 259
    ids = tokenizer.encode("a<|tool|>b<|endoftext|>")
    assert ids == [*bytes_of("a"), 257, *bytes_of("b<|endoftext|>")]
    assert tokenizer.decode(ids) == "a<|tool|>b<|endoftext|>"
    assert tokenizer.encode_batch(["<|end|>", "x"]) == [[258], [120]]
    assert tokenizer.ordinary_ids == list(range(256))
    assert tokenizer.fingerprint != make_tokenizer("bytes").fingerprint
    assert make_tokenizer("bytes").with_new_tokens([]).fingerprint == make_tokenizer("bytes").fingerprint


def test_a_token_that_the_tokenizer_has_keeps_its_number_and_is_read_all_the_same() -> None:
    own = train_bpe(["hello world"] * 9, 262)
    (word,) = own.encode("hello")[:1] if len(own.encode("hello")) == 1 else [None]
    known = own.with_new_tokens(["<|endoftext|>", *(["hello"] if word else [])])
    assert known.vocab_size == own.vocab_size
    assert known.ids_of(["<|endoftext|>"]) == own.ids_of(["<|endoftext|>"])
    assert known.encode("<|endoftext|>") == [own.end_of_document] != own.encode("<|endoftext|>")
    # How it reads is another matter, so stores are not shared.
    assert known.fingerprint != own.fingerprint


@pytest.mark.parametrize("again", [lambda t: t.for_chat(), lambda t: t.for_masking(), lambda t: t.for_classification()])
def test_new_tokens_stay_new_in_every_task_and_in_a_folder(again: Callable[[Tokenizer], Tokenizer], tmp_path: Path) -> None:
    """Tokenizing processes read the tokenizer from a folder."""
    tokenizer = again(make_tokenizer("bytes").with_new_tokens(NEW))
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(str(tmp_path / "t"))
    for one in (tokenizer, loaded):
        assert one.new_tokens == tuple(NEW)
        assert one.encode("<|tool|>") == [257]
    assert loaded.fingerprint == tokenizer.fingerprint


def test_transformers_reads_the_exported_tokenizer_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer("bytes").with_new_tokens(NEW)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 259
    assert theirs("a<|tool|>b")["input_ids"] == tokenizer.encode("a<|tool|>b")
    assert {259 - 2, 259 - 1} <= set(theirs.all_special_ids) | set(theirs.added_tokens_decoder)


def test_in_conversations_contents_and_templates_alike() -> None:
    backend = make_tokenizer("bytes").with_new_tokens(NEW)
    tokenizer = Tokenizer(
        backend._backend, end_of_document="<|endoftext|>", config={"chat_template": TEMPLATE, "new_tokens": NEW}
    )
    chat = Chat(tokenizer, seq_len=64, learned="answers")
    turns = [Message("user", "use <|tool|>", False), Message("assistant", "<|tool|>1<|endoftext|>", True)]
    encoded = chat.encode(chat.render(Conversation(tuple(turns))))
    assert encoded is not None
    assert encoded.ids == [
        *bytes_of("user:use "),
        *(257, 258),
        *bytes_of("assistant:"),
        *(257, *bytes_of("1<|endoftext|>"), 258),
    ]
    learned = [token for token, is_target in zip(encoded.ids, encoded.is_target, strict=True) if is_target]
    assert learned == [257, *bytes_of("1<|endoftext|>"), 258]


def test_a_tokenizer_that_leaves_numbers_out_has_no_room() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocabulary = {"a": 0, "b": 1, "<eos>": 2, "c": 4}  # the next number would be 4
    tokenizer = Tokenizer(Backend(models.WordLevel(vocabulary, unk_token="a")), end_of_document="<eos>")
    with pytest.raises(RecipeError, match=r"data.new_tokens: this tokenizer leaves numbers out"):
        tokenizer.with_new_tokens(["<x>"])


# ------------------------------------------------------------------------------------------------ recipes


def test_what_may_be_named() -> None:
    recipe = Recipe.model_validate({"data": {"new_tokens": ["<x>", "<x>", " \n"]}})
    lines = [finding.message for finding in new_token_findings(recipe)]
    assert lines == [
        'data.new_tokens names "<x>" 2 times: once is enough',
        'data.new_tokens: " \\n" is white space, which texts are full of: name something rare',
    ]


def test_which_configs_grow() -> None:
    assert grown({"vocab_size": 61}, 67, 6) == {"vocab_size": 67}
    assert grown({"vocab_size": 61}, 67, 5) == {"vocab_size": 61}, "an ordinary symbol has no row"
    assert grown({"vocab_size": 96}, 67, 6) == {"vocab_size": 96}, "padded"
    assert grown({"vocab_size": 61, "decoder_vocab_size": 61}, 62, 1) == {"vocab_size": 62, "decoder_vocab_size": 62}
    assert number_at_the_end(67, {3, 65, 66}) == 2
    assert stand_ins(2, 10) == (2, 7)
    assert stand_ins(0, 10) == ()


def test_two_vocabularies_cannot_grow_for_one_tokenizer() -> None:
    network = replace(network_of("tied"), source_vocab_size=67)
    recipe = Recipe.model_validate({"data": {"new_tokens": ["<x>"]}})
    (finding,) = growth_findings(recipe, network)
    assert finding.message.startswith("data.new_tokens: this llama has an embedding for each of its two vocabularies")
    assert list(growth_findings(recipe, network_of("tied"))) == []


class FakeSymbols:
    """`first`: the first added one."""

    vocab_size = 70

    def __init__(self, first: int) -> None:
        self.first = first

    def from_number(self, first: int) -> dict[str, bool]:
        return {f"<{number}>": number >= self.first for number in range(first, 70)}


def test_a_larger_tokenizer_is_refused_with_what_is_missing() -> None:
    require_rows("base", 70, FakeSymbols(0), [])
    require_rows("base", None, FakeSymbols(0), [])
    require_rows("base", 68, FakeSymbols(68), ["<68>", "<69>"])
    with pytest.raises(RecipeError) as refused:
        require_rows("base", 67, FakeSymbols(67), ["<68>"])
    assert str(refused.value) == (
        "base: the weights have 67 rows of embedding, and data.tokenizer has 70 symbols: those that were added to it have no "
        'rows; name them, data.new_tokens ["<67>", "<69>"], and they get rows that learn'
    )
    with pytest.raises(RecipeError, match=r'ordinary ones that the weights do not know \(\["<60>", .*"<67>"\] and 1 more\)'):
        require_rows("base", 60, FakeSymbols(69), [])


def test_verify_trains_rows_where_everything_else_is_frozen(tmp_path: Path) -> None:
    """All over the vocabulary, so that each tensor rank has some; as many as the twin's vocabulary has room for."""
    from parallel.topology import Layout
    from trainer.recipe import load
    from trainer.verify.twin import full_size, scaled_down

    given = {
        "model": {"family": "llama", "config": FAMILIES["tied"][1]},
        "data": {"seq_len": 32, "new_tokens": [f"<{n}>" for n in range(9)]},
        "tuning": {"method": "lora"},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(given))
    for twin, tokens in ((scaled_down(load(path), [Layout(tp=2)]), 6), (full_size(load(path)), 9)):
        assert twin.given["data"]["new_tokens"] == [f"<{n}>" for n in range(tokens)]
        path.write_text(json.dumps(twin.given))
        network = load(path).network(vocab_size=None)
        assert len({token * 2 // network.vocab_size for token in network.new_tokens}) == 2
        path.write_text(json.dumps(given))
    path.write_text(json.dumps({**given, "tuning": {}}))
    assert "new_tokens" not in scaled_down(load(path), [Layout(tp=2)]).given["data"]


def test_another_list_is_another_model_on_resuming() -> None:
    saved, given = (recipe_facts(Recipe.model_validate({"data": {"new_tokens": tokens}})) for tokens in (["<x>"], []))
    (line,) = refusals("c", 1, saved, given, ())
    assert line.startswith('data.new_tokens: c was saved with ["<x>"], this run has []: it is another model')
    assert refusals("c", 1, {key: value for key, value in given.items() if key != "data.new_tokens"}, given, ()) == []


# ------------------------------------------------------------------------------------------------ rows that grow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": ("llama", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "gemma2": ("gemma2", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "bert": ("bert", {**SIZES, "max_position_embeddings": 64}),
}


def network_of(name: str, vocab_size: int = SIZE) -> TransformerConfig:
    family, sizes = FAMILIES[name]
    return from_hf(family, {**sizes, "vocab_size": vocab_size})


def transformers_model(name: str, folder: Path | None = None) -> Any:
    """Of a folder; None: drawn at random, of ROWS symbols."""
    import transformers

    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    if folder is not None:
        return kind.from_pretrained(folder, attn_implementation="eager").eval()
    torch.manual_seed(0)
    config = to_hf(network_of(name, ROWS), dtype="float32", eos_token_id=0)
    model = kind.from_config(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():  # biases of heads start at 0, whose mean would say nothing
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_grow_as_transformers_resizes(name: str, tmp_path: Path) -> None:
    """Of a folder's weights every row is its own to the bit; what is added is the mean, to which transformers adds noise of
    3e-5 of the rows' own spread."""
    theirs = transformers_model(name)
    theirs.save_pretrained(tmp_path)
    own = {key: value.clone() for key, value in theirs.state_dict().items()}
    theirs.resize_token_embeddings(SIZE)
    resized = dict(theirs.state_dict())
    if name == "bert":  # ties the bias of its head, and fills it up with zeros; in other heads transformers has the mean too
        bias = own["cls.predictions.bias"]
        resized["cls.predictions.bias"] = torch.cat([bias, bias.mean().expand(SIZE - ROWS)])
    weights = PretrainedWeights(tmp_path, grown=(ROWS, SIZE))
    stage = whole_model(network_of(name), Tuning(), "cpu", weights.fill).eval()
    found = dict(assembled((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage)))
    assert sum(tensor.shape[0] == SIZE for tensor in found.values()) == {"untied": 2, "bert": 2}.get(name, 1)
    for key, tensor in found.items():
        rows = own[key].shape[0]
        assert torch.equal(tensor[:rows], own[key]), key
        # 6 standard deviations of the noise: 6 · 3e-5 · 0.15.
        torch.testing.assert_close(tensor, resized[key], rtol=0, atol=3e-5, msg=key)
        if tensor.shape[0] == SIZE:
            assert (tensor[ROWS:] == tensor[ROWS]).all()


def test_a_bias_that_lies_down_grows_too(tmp_path: Path) -> None:
    """Marian's, [1, V]."""
    from safetensors.torch import save_file

    from parallel.pieces import Piece

    bias = torch.randn(1, ROWS)
    save_file({"final_logits_bias": bias}, tmp_path / "model.safetensors")
    weights = PretrainedWeights(tmp_path, grown=(ROWS, SIZE))
    box = weights.read(Piece("final_logits_bias", (1, SIZE), (0, ROWS - 2), (1, 4)))
    torch.testing.assert_close(box, torch.cat([bias[:, -2:], bias.mean().expand(1, 2)], 1), rtol=0, atol=1e-7)
    beyond = weights.read(Piece("final_logits_bias", (1, SIZE), (0, ROWS + 1), (1, 3)))
    torch.testing.assert_close(beyond, bias.mean().expand(1, 3), rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ rows beside what is frozen


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_compute_what_plain_matrices_would(tied: bool, softcap: float | None) -> None:
    """Sums, losses by token, measures and logits; the rows' gradient is that of the matrices' rows, in float64."""
    alone, tokens = TensorParallel.alone(), (2, 5, 36)
    embedding = VocabParallelEmbedding(37, 12, name="e.weight", init=Init(std=0.5), tp=alone)
    head = VocabParallelHead(
        37, 12, name="h.weight", init=Init(std=0.5), tp=alone, tied_to=embedding if tied else None, bias="b", softcap=softcap
    )
    both = nn.ModuleList([embedding, head]).requires_grad_(False)
    embedding.train_rows(tokens, "e")
    head.share_rows(embedding) if tied else head.train_rows(tokens, "h")
    initialise(both, seed=0)
    both.double()
    stream = torch.Generator().manual_seed(0)
    rows = [matrix.token_rows for matrix in ((embedding,) if tied else (embedding, head))]
    for row in rows:
        row.data = torch.randn(row.shape, generator=stream, dtype=torch.float64)
    weights = [embedding.weight.clone(), head.weight.clone()]
    for number, weight in enumerate(weights):
        weight[list(tokens)] = rows[min(number, len(rows) - 1)].detach()
        weight.requires_grad_()
    ids = torch.randint(0, 37, (40,), generator=stream)
    ids[:3] = torch.tensor(tokens)
    labels = ids.roll(-1).masked_fill(torch.arange(40) % 5 == 0, IGNORE)

    def plain() -> tuple[Tensor, Tensor]:
        logits = nn.functional.embedding(ids, weights[0]) @ weights[1].T + head.bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits, cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")

    logits, losses = plain()
    torch.testing.assert_close(head.logits(embedding(ids)), logits)
    torch.testing.assert_close(head.losses_and_hits(embedding(ids), labels)[0], losses)
    of_tokens = torch.randn(40, generator=stream, dtype=torch.float64)
    for ours, theirs in (
        (head.loss_sum(embedding(ids), labels), losses.sum()),
        ((head.token_losses(embedding(ids), labels) * of_tokens).sum(), (losses * of_tokens).sum()),
    ):
        torch.testing.assert_close(ours, theirs)
        expected = [grad[list(tokens)] for grad in torch.autograd.grad(theirs, weights, retain_graph=True)]
        expected = [expected[0] + expected[1]] if tied else expected
        torch.testing.assert_close(list(torch.autograd.grad(ours, rows)), expected)


LEAVING = [
    *((name, "lora") for name in FAMILIES),
    ("untied", "dora"),
    ("tied", "adalora"),
    ("tied", "ia3"),
    ("untied", "ia3"),
    ("untied", "adapter"),
    ("gpt2", "bitfit"),
]


@pytest.mark.parametrize(("name", "method"), LEAVING)
def test_an_adapter_with_rows_leaves_and_merges(name: str, method: str, tmp_path: Path) -> None:
    """The base is a folder with fewer rows, for which transformers makes room; peft or our loader puts the rest on it. Merged
    they are one model without anything beside it. All that was trained is put at random."""
    base = transformers_model(name)
    base.save_pretrained(tmp_path / "base")
    network, weights = replace(network_of(name), new_tokens=TOKENS), PretrainedWeights(tmp_path / "base", grown=(ROWS, SIZE))
    recipe = Recipe.model_validate({"model": {"from_pretrained": "base"}, "tuning": {"method": method}})

    def fill(block: nn.Module) -> None:
        weights.fill(block)
        initialise(block, seed=0, only=lambda spec: spec.added)

    stage = whole_model(network, recipe.tuning, "cpu", fill).eval()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter, _ in owned_specs(stage):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)
    tokens = torch.arange(SIZE)[None, -12:]
    expected = stage(tokens, batch=MicroBatch(tokens, Documents(((12,),))), output="logits").detach()

    tensors = dict(assembled((spec, parameter.detach()) for _, parameter, spec in owned_specs(stage)))
    assert set(token_rows(recipe.tuning, network).values()) <= {key for key in tensors if is_added(key)}
    whole = dict(merged(tensors.items(), tuning=recipe.tuning, network=network))
    assert not any(map(is_added, whole))
    for key, rows in token_rows(recipe.tuning, network).items():
        assert torch.equal(whole[key][list(TOKENS)], tensors[rows])
    if method != "adapter":
        plain = whole_model(network, Tuning(), "cpu", lambda block: set_all(block, whole)).eval()
        torch.testing.assert_close(
            plain(tokens, batch=MicroBatch(tokens, Documents(((12,),))), output="logits"), expected, rtol=1e-4, atol=1e-5
        )  # fp32, other sums
    if method == "bitfit":
        return
    (tmp_path / "adapter").mkdir()
    AdapterFormat.of(recipe, network).write(tensors.items(), tmp_path / "adapter", torch.float32)
    theirs = loaded_with_adapter(name, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(theirs(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def set_all(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    for _, parameter, spec in owned_specs(block):
        for piece in spec.pieces:
            piece.in_parameter(parameter.data).copy_(piece.box_of(tensors[piece.name]))


def loaded_with_adapter(name: str, base: Path, adapter: Path) -> Any:
    import peft

    model = transformers_model(name, base)
    if (adapter / "bottleneck_config.json").exists():
        return load_bottlenecks(model, adapter)
    model.resize_token_embeddings(SIZE)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert ("trainable_token_indices" in config) != ("modules_to_save" in config)
    return model


def test_without_a_method_nothing_is_put_beside() -> None:
    network = replace(network_of("tied"), new_tokens=TOKENS)
    stage = whole_model(network, Tuning(), "cpu", lambda block: initialise(block, seed=0)).eval()
    assert not any(spec.added for _, _, spec in owned_specs(stage))
    assert token_rows(Tuning(), network) == {}


def test_rows_are_counted_as_trained() -> None:
    network = replace(network_of("untied"), new_tokens=TOKENS)
    plain, with_rows = (
        whole_model(each, Tuning(method="lora"), "cpu", lambda block: initialise(block, seed=0))
        for each in (network_of("untied"), network)
    )
    counts = [
        ParameterCounts.of([(p, spec) for _, p, spec in owned_specs(stage)], TensorParallel.alone().group, torch.device("cpu"))
        for stage in (plain, with_rows)
    ]
    assert counts[1].trained - counts[0].trained == 2 * len(TOKENS) * 32
    assert counts[1].frozen == counts[0].frozen
