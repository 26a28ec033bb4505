"""What an error line suggests is taken when it is written: no key or value that is refused next."""

import copy
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trainer.convert.words import words
from trainer.errors import RecipeError
from trainer.recipe import known_keys, load_given
from trainer.recipe.marks import KeyPath, dotted, path_of

BASE: dict[str, Any] = {"model": {"family": "gpt2"}}
VALUES: list[Any] = [
    *(True, False, 8, 3.0, 0.1, -1, "x", "8", "true", "cpu", "bf16", "cosine"),
    *([], ["x"], [1], {}, {"a": 1}, None),
]
KEY = r"[a-z_]+(?:\[0\])?(?:\.[a-z_]+(?:\[0\])?)*"
JSON = r'"[^"]*"|\[.*?\]|\{.*?\}|-?[\d.e-]+|true|false'
# KEY = VALUE, with OTHER VALUE. Words behind a key, such as ", a number > 0", say what to write.
OFFER = re.compile(
    rf"(?P<key>{KEY})(?: = (?P<value>{JSON}))?(?P<words>, (?:a|an|one of|true) [^;?]*)?(?P<more>(?:, with {KEY} (?:{JSON}))*)"
)
# What a rule about the whole recipe, or about this machine, says of a value that is the user's own.
OF_THE_WHOLE = re.compile(
    r"does not exist|does not divide|this version has|needs (?:a |zero|model)|two or more names|but the tokenizer"
    r"|path of a \.jinja|compares evaluations|no such figure"
)


def lines_of(recipe: dict[str, Any]) -> list[str]:
    try:
        load_given(recipe, Path("r.json"))
    except RecipeError as error:
        return [line.removeprefix("r.json: ") for line in error.lines]
    return []


def put(recipe: dict[str, Any], path: KeyPath, value: Any) -> None:
    here: Any = recipe
    for part, following in pairwise(path):
        if isinstance(here, list):
            here += [{}] * (part + 1 - len(here))  # type: ignore[operator]
            here = here[part]  # type: ignore[index]
        else:
            if not isinstance(here.get(part), dict | list):
                here[part] = [] if isinstance(following, int) else {}
            here = here[part]
    if isinstance(here, list):
        here[:] = [value]
    else:
        here[path[-1]] = value


def with_value(path: KeyPath, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(BASE)
    put(recipe, path, value)
    return recipe


def suggested(line: str, path: KeyPath, value: Any) -> Iterator[dict[str, Any]]:
    """Yield each recipe that the line suggests in place of one with the value at the path."""
    told = re.search(r"(?:did you mean|: write) (.*?)\??$", line)
    if line.startswith("unknown key"):
        told = None if " takes " in line else told  # it says what to write, and no value
        for offers in re.split(r" or (?=[a-z_]+\.)", told[1]) if told else []:
            recipe, found = copy.deepcopy(BASE), False
            for offer in offers.split(" and "):
                parts = OFFER.fullmatch(offer)
                if parts and not parts["words"] and re.sub(r"\[\d+\]", "[0]", parts["key"]) in known_keys():
                    found = True
                    put(recipe, path_of(parts["key"]), json.loads(parts["value"]) if parts["value"] else copy.deepcopy(value))
                    for other, needed in re.findall(rf", with ({KEY}) ({JSON})", parts["more"]):
                        put(recipe, path_of(other), json.loads(needed))
            if found:
                yield recipe
        return
    told = re.search(r"; (?:did you mean|write) (.*?)(?: without quotes)?\??$", line)
    for text in told[1].split(" or ") if told else []:
        at = re.match(rf"({KEY}) =", line)
        yield with_value(path_of(at[1]) if at else path, json.loads(text))


def faults(recipe: dict[str, Any], keys: set[str]) -> list[str]:
    """The lines about one of these keys, or about what is in it."""
    begins = tuple(begin for key in keys for begin in (f"{key} ", f"{key}[", f"unknown key {key}"))
    return [line for line in lines_of(recipe) if line.startswith(begins) and not OF_THE_WHOLE.search(line)]


def refused_next(path: KeyPath, value: Any) -> Iterator[str]:
    """Yield each suggestion that is refused when it is followed."""
    for line in lines_of(with_value(path, value)):
        for recipe in suggested(line, path, value):
            named = {key for key in re.findall(KEY, line) if key in known_keys()}
            if wrong := faults(recipe, named if line.startswith("unknown key") else {dotted(path)}):
                yield f"{line}  →  {json.dumps(recipe)}  →  {wrong[0]}"


# Each key and word meets some of the values every day, all of them in the grid.
SHARES = [pytest.param(4, id="a share"), pytest.param(1, id="all", marks=pytest.mark.grid)]
SECTIONS: list[KeyPath] = [(), ("train",), ("model",), ("data",), ("tuning",), ("zero",), ("tracking", "wandb")]


@pytest.mark.parametrize("share", SHARES)
def test_a_value_that_is_suggested_is_taken(share: int) -> None:
    paths = [path_of(key) for key in known_keys() if key != "extends"]
    pairs = [(path, value) for number, path in enumerate(paths) for value in VALUES[number % share :: share]]
    assert [line for path, value in pairs for line in refused_next(path, value)] == []


@pytest.mark.parametrize("share", SHARES)
def test_a_key_that_is_suggested_is_taken(share: int) -> None:
    pairs = [
        ((*SECTIONS[number % len(SECTIONS)], word), value)
        for number, word in enumerate(sorted(words()))
        for value in VALUES[number % share :: share]
    ]
    assert [line for path, value in pairs for line in refused_next(path, value)] == []


LEGAL = re.compile(rf"({KEY}) ({JSON})")


@pytest.mark.parametrize(
    "recipe",
    [
        {"zero": {"stage": 1, "offload_param": {"device": "cpu"}}},
        {"zero": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "nvme"}}},
        {"zero": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        {"zero": {"stage": 2}, "optimizer": {"name": "adafactor"}},
        {"optimizer": {"name": "adafactor"}, "parallel": {"tensor": 2}},
        {"zero": {"stage": 1}, "guard": {"on_spike": "skip"}},
        {"train": {"label_smoothing": 0.1}, "model": {"family": "auto", "config": {"model_type": "bloom"}}},
        {"parallel": {"tensor": 2}, "model": {"family": "auto", "config": {"model_type": "bloom"}}},
        {"train": {"recompute": "selective"}, "model": {"family": "auto", "config": {"model_type": "bloom"}}},
        {"train": {"steps": 10}, "schedule": {"warmup_steps": 20}},
        {"data": {"task": "mlm"}, "train": {"sample_prompt": "x"}, "model": {"family": "bert"}},
        {"parallel": {"tensor": 5, "sequence_parallel": False}},
        {"data": {"tokenizer": "bpe:12"}},
        {"train": {"eval_every": 5}, "data": {"eval_fraction": 0.0}},
    ],
    ids=json.dumps,
)
def test_what_a_rule_calls_legal_is_taken(recipe: dict[str, Any]) -> None:
    """Each KEY VALUE of a line's "legal: …" is written, and the line is not said again."""
    given = {**BASE, **recipe}
    (line,) = lines_of(given)
    for key, value in LEGAL.findall(line.partition("legal: ")[2]):
        if key in known_keys():
            mended = copy.deepcopy(given)
            put(mended, path_of(key), json.loads(value))
            assert not [again for again in lines_of(mended) if again.split(" ")[0] == line.split(" ")[0]], (key, value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"tracking": {"wandb": True}}, 'must be an object, not a boolean; write {"mode": "online"}'),
        ({"tracking": {"wandb": {"mode": True}}}, 'did you mean "online"?'),
        ({"data": {"sources": "x"}}, 'must be a list of at least 1, not a string; write [{"path": "x"}]'),
        ({"tuning": {"r": 8}}, 'unknown key tuning.r; did you mean tuning.rank, with tuning.method "lora"?'),
        ({"tuning": {"method": "lora", "r": 8}}, "unknown key tuning.r; did you mean tuning.rank?"),
        ({"lora_r": 8}, 'unknown key lora_r; did you mean tuning.rank, with tuning.method "lora"?'),
        ({"train": {"save_steps": 8}}, "unknown key train.save_steps; did you mean checkpoint.every?"),
        ({"data": {"val_set_size": 0.1}}, "did you mean data.eval_fraction?"),
        ({"data": {"sequence_len": 8}}, "did you mean data.seq_len?"),
        ({"model": {"base_model": "x/y"}}, "unknown key model.base_model; did you mean model.from_pretrained?"),
        ({"batch": {"per_device_train_batch_size": 2}}, "did you mean batch.micro_sequences?"),
        ({"q_proj": True}, 'did you mean tuning.targets = ["q"], with tuning.method "lora"?'),
        ({"tuning": {"method": "lora", "targets": ["q_proj"]}}, 'did you mean "q"?'),
        ({"tuning": {"method": "lora", "targets": ["c_attn"]}}, 'did you mean "q" or "k" or "v"?'),
        ({"load_in_4bit": True}, 'did you mean tuning.quantize = "nf4", with tuning.method "lora"?'),
        ({"optimizer": {"name": "paged_adamw_8bit"}}, 'did you mean "adamw"?'),
        (
            {"schedule": {"lr_scheduler_type": "linear"}},
            'did you mean schedule.name = "linear" and schedule.min_lr_ratio = 0.0?',
        ),
        ({"rl": "dpo"}, 'did you mean data.task = "preference" and preference.loss = "dpo"?'),
        ({"bf16": True}, 'did you mean precision.dtype = "bf16"?'),
        ({"bf16": False}, "it asks for nothing here: remove it"),
        ({"precision": "bf16"}, '; write {"dtype": "bf16"}'),
        ({"zero": 3}, '; write {"stage": 3}'),
        ({"optimizer": {"learning_rate": "fast"}}, "did you mean optimizer.lr, a number > 0?"),
        ({"neftune_noise_alpha": 5}, "transformers has it, and there is no counterpart: noise on embeddings is not there"),
        ({"lora_rnk": 8}, "did you mean tuning.rank"),
    ],
)
def test_words_of_other_tools_are_understood(override: dict[str, Any], said: str) -> None:
    assert any(said in line for line in lines_of(BASE | override)), lines_of(BASE | override)
