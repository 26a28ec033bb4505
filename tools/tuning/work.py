"""The works that trainers are compared in: the model, the data and the recipe of each.

Models have random weights and tokens are words of a made-up language, since only time is measured.
The lengths of texts are drawn as those of real ones are: many short, a few long.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contest import CLIP_NORM, LR, SEED, WARM_UP, Shape

from trainer.schema import Dtype

SPECIAL = ("<pad>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
OF_TEMPLATE = 6  # tokens that it puts around a question and its answer
ROLES = ("user", "assistant")
ANSWERS = ("chosen", "rejected")
ADAPTER = {"method": "lora", "rank": 16, "alpha": 32, "targets": ["attention", "mlp"]}
SPREAD = 0.6  # of the logarithm of lengths: the longest of 20 texts is about three times the median


@dataclass(frozen=True)
class Work:
    """The task of a work, its model, and the rows of its data."""

    task: str
    family: str
    rows: Callable[[Words, Shape], Iterator[dict[str, str]]]
    keys: Mapping[str, Any]  # of the recipe, beside those of every work
    parts: int = 1  # a row's tokens over data.seq_len


class Words:
    """A made-up language, its texts drawn from one stream."""

    def __init__(self, vocab: int) -> None:
        self.words = [f"w{number}" for number in range(vocab - len(SPECIAL) - len(ROLES))]
        self._dice = random.Random(SEED)

    def text(self, median: float, longest: int) -> str:
        """Return a text of `median` words in the middle of all, and of `longest` at most."""
        drawn = round(self._dice.lognormvariate(math.log(median), SPREAD))
        return " ".join(self._dice.choices(self.words, k=max(1, min(drawn, longest))))


def _chats(words: Words, shape: Shape) -> Iterator[dict[str, str]]:
    """Yield conversations of which about four share a row."""
    for _ in range(_enough(shape)):
        prompt = words.text(shape.seq_len / 16, shape.seq_len // 4)
        yield {"prompt": prompt, "completion": words.text(shape.seq_len / 8, shape.seq_len // 2)}


def _pairs(words: Words, shape: Shape) -> Iterator[dict[str, str]]:
    """Yield prompts with two answers, of such lengths that two pairs, and no third, share a row: so
    steps have equally many, and a trainer may take them in micro-batches of equal size."""
    yielded = 0
    while yielded < _enough(shape):
        prompt = words.text(shape.seq_len / 16, shape.seq_len // 8)
        chosen, rejected = (words.text(shape.seq_len / 8, shape.seq_len // 4) for _ in ANSWERS)
        tokens = sum(len(f"{prompt} {answer}".split()) + OF_TEMPLATE for answer in (chosen, rejected))
        if shape.seq_len // 3 < tokens <= shape.seq_len // 2:
            yielded += 1
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _translations(words: Words, shape: Shape) -> Iterator[dict[str, str]]:
    """Yield sentences and their translations, of which about eight share a row."""
    for _ in range(2 * _enough(shape)):
        yield {name: words.text(shape.seq_len / 20, shape.seq_len // 4) for name in ("source", "target")}


def _enough(shape: Shape) -> int:
    return 64 * shape.micro_sequences


WORKS: Mapping[str, Work] = {
    "sft": Work("sft", "llama", _chats, {}),
    "lora": Work("sft", "llama", _chats, {"tuning": ADAPTER}),
    "dpo": Work("preference", "llama", _pairs, {"preference": {"loss": "dpo", "beta": 0.1}}),
    "translate": Work("translate", "marian", _translations, {}, parts=2),
}


@dataclass(frozen=True)
class Place:
    """The folder of a work and a format, with all that its loops read."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.json"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.json"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def lay_out(place: Place, work: Work, shape: Shape, dtype: Dtype, *, repeats: int) -> None:
    """Write the model, the data and the recipe of a work."""
    place.folder.mkdir(parents=True)
    words = Words(shape.vocab)
    _save_model(place.model, work, shape)
    _save_tokenizer(place.model, words)
    data = place.folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in work.rows(words, shape)), encoding="utf-8")
    recipe = {
        "run": {"name": "ours", "dir": str(place.folder / "runs"), "seed": SEED},
        "model": {"from_pretrained": str(place.model)},
        "data": {
            "task": work.task,
            "sources": [{"path": str(data)}],
            "tokenizer": str(place.model),
            "seq_len": shape.seq_len // work.parts,
            "eval_fraction": 0.0,
            "cache_dir": str(place.folder / "prepared"),
            "workers": 1,
        },
        "batch": {"global_sequences": shape.micro_sequences, "micro_sequences": shape.micro_sequences},
        "precision": {"dtype": dtype},
        "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
        "schedule": {"name": "constant", "warmup_steps": 0},
        # one step more than is taken: the run is ended before it
        "train": {"steps": WARM_UP + repeats + 1, "clip_norm": CLIP_NORM, "log_every": 1},
        "checkpoint": {"every": 0},
        **work.keys,
    }
    place.recipe.write_text(json.dumps(recipe, indent=2), encoding="utf-8")


def _save_model(folder: Path, work: Work, shape: Shape) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    if work.family == "llama":
        llama = transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.seq_len,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
        transformers.LlamaForCausalLM(llama).save_pretrained(folder)
        return
    sides = {"layers": shape.layers // 2 or 1, "attention_heads": shape.heads, "ffn_dim": shape.ffn}
    marian = transformers.MarianConfig(
        vocab_size=shape.vocab,
        decoder_vocab_size=shape.vocab,
        d_model=shape.hidden,
        max_position_embeddings=shape.seq_len,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=2,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
    )
    transformers.MarianMTModel(marian).save_pretrained(folder)


def _save_tokenizer(folder: Path, words: Words) -> None:
    """Write a tokenizer in which each word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate((*SPECIAL, *ROLES, *words.words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **named, additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
