"""Text from a model: during a run from its engine, afterwards from what the run left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.rng import derive_seed
from trainer.data.chat import Chat
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json
from trainer.inference.last_space import only, without_last_space
from trainer.inference.model_folder import ModelFolder
from trainer.inference.shown import TextStream
from trainer.inference.text_model import TextModel, Writing
from trainer.model.hugging_face import read_config
from trainer.model.model_files import TASK
from trainer.model.origin import as_list
from trainer.tasks import TASKS

ENDLESS = 1 << 30  # tokens: a conversation is never cut


def sample(
    next_logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    new_tokens: int,
    context: int,
    end: int,
    temperature: float,
    top_k: int,
    seed: int,
    first: Sequence[int] = (),
) -> list[int]:
    """Continue `prompt` by at most `new_tokens` tokens, up to `end`. The first of them is one of
    `first`, if that is given.

    The model sees the last `context` tokens. Every rank that takes part draws the same tokens,
    because the random stream depends on the seed only. temperature 0 takes the likeliest token.
    """
    stream = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    tokens = list(prompt)
    for number in range(new_tokens):
        logits = only(next_logits(tokens[-context:]), () if number else first)
        if temperature == 0.0:
            token = int(logits.argmax())
        else:
            best = torch.topk(logits / temperature, min(top_k, logits.numel()))
            token = int(best.indices[torch.multinomial(best.values.softmax(-1), 1, generator=stream)])
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


Way = Literal["chat", "raw"]


def way_of(found: ModelFolder, asked: Way | None) -> tuple[Way, str]:
    """Return whether a model answers a user's message or continues a text, and why.

    `asked`: the way that is asked for, or None to go by what the model was taught. RecipeError if
    it is to answer and has no template.

    A template alone means little: base models often come with the tokenizer of taught ones. Our own
    folders name the task (`finetuning_task` in config.json). Other models, and adapters, were
    taught if their generation ends at the end of a turn.
    """
    tokenizer = _ours(found)
    if tokenizer is None or not tokenizer.has_template:
        if asked == "chat":
            raise RecipeError(f"--chat: the tokenizer in {found.tokenizer} has no chat template: leave it out")
        return "raw", "the text is continued as it is: its tokenizer has no chat template"
    if asked is not None:
        as_asked = {"chat": "asked as a user's message (--chat)", "raw": "continued as it is (--raw)"}
        return asked, f"the text is {as_asked[asked]}"
    taught, why = taught_to_answer(found, tokenizer)
    if taught:
        return "chat", f"the text is asked as a user's message: {why}; --raw continues it as it is"
    return "raw", f"the text is continued as it is: {why}; --chat asks it by the chat template"


def taught_to_answer(found: ModelFolder, tokenizer: Tokenizer) -> tuple[bool, str]:
    """Return whether a model was taught to answer by its template, and how that is known."""
    task = None if found.adapter else read_config(found.model).get(TASK)
    if task is not None:
        return task in TASKS and TASKS[task].answers, f"data.task {task} trained it"
    taught = _end_of_turn(tokenizer) in ends_of(found)
    return taught, f"its generation {'ends' if taught else 'does not end'} at the end of a turn"


def _ours(found: ModelFolder) -> Tokenizer | None:
    """Return the tokenizer as it would train here; None if it names no end of a document, which
    every chat model's does."""
    try:
        return load_tokenizer(str(found.tokenizer))
    except RecipeError:
        return None


def template_of(found: ModelFolder) -> Chat:
    """Return the chat template of a model's tokenizer, in the form in which it writes conversations
    that are learned."""
    return Chat(load_tokenizer(str(found.tokenizer)), seq_len=ENDLESS, learned="answers")


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a turn; None if the template does not write a question and its
    answer."""
    try:
        return Chat(tokenizer, seq_len=ENDLESS, learned="answers").end_of_turn
    except RecipeError:
        return None


def ends_of(found: ModelFolder) -> list[int]:
    """Return the tokens at which generation by a model ends."""
    path = found.generation_config
    try:
        generation = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}; fix or remove the file") from None
    return as_list(generation.get("eos_token_id", read_config(found.model).get("eos_token_id")))


def ends_of_answers(found: ModelFolder, chat: Chat) -> list[int]:
    """Return the same for answers: the token that ends a turn is always among them, because the
    model would go on as the user."""
    return list(dict.fromkeys([*ends_of(found), chat.end_of_turn]))


def write_text(
    found: ModelFolder,
    prompt: str,
    writing: Writing,
    *,
    seed: int,
    show: Callable[[str], None],
    way: Way = "raw",
    key: str = "--prompt",
) -> None:
    """Have a model write: the answer to the prompt, or the prompt and its continuation. `show` gets
    the text piece by piece; `key`: what gave the prompt, for a message.

    It writes at most `writing.new_tokens` tokens, up to where its generation ends or the model's
    last position. RecipeError for a prompt that leaves no room, DataError for a folder that does
    not load whole.
    """
    model = TextModel(found, seed=seed)
    if not prompt:
        raise RecipeError(f"{key} is empty: give at least one character")
    ends, first = ends_of(found), list[int]()
    if way == "chat":
        chat = template_of(found)
        tokens, ends = chat.prompt(prompt, key=key), ends_of_answers(found, chat)
    else:
        tokens, first = begun(model.tokenizer, prompt)
    if len(tokens) >= model.positions:
        raise RecipeError(
            f"{key} has {len(tokens)} tokens, but the model has {model.positions} positions: give fewer than that"
        )
    stream = TextStream(model.tokenizer, show)
    if way == "raw":
        stream.put(tokens)
    model.more(tokens, writing, ends=ends, first=first, hear=stream.put)
    stream.end()


def begun(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that goes on, and those of which the next must be one; [] for
    any.

    What the tokenizer writes before a text is there, what it writes after is not.
    """
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    bare: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = next((n for n in range(len(tokens) - len(bare) + 1) if tokens[n : n + len(bare)] == bare), 0) + len(bare)
    return without_last_space(tokens[:after], tokenizer.convert_ids_to_tokens(range(len(tokenizer))))


def translates(found: ModelFolder) -> bool:
    """Return whether a model has an encoder and a decoder."""
    try:
        config = read_json(found.model / "config.json")
    except (OSError, ValueError):  # loading it will report the error
        return False
    return config.get("is_encoder_decoder") is True
