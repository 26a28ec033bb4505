"""Text from a model: during a run from its engine, afterwards from an exported folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from parallel.rng import derive_seed
from trainer.data.chat import Chat
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json, require_regular_below, told
from trainer.inference.last_space import only, without_last_space
from trainer.model.hugging_face import read_config
from trainer.model.model_files import TASK
from trainer.model.origin import GENERATION_CONFIG, as_list
from trainer.tasks import TASKS
from trainer.tuning import bottleneck_format, peft_format

TEMPERATURE, TOP_K = 0.8, 50
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


@dataclass(frozen=True)
class Writing:
    """The way in which a text is written. `temperature`, `top_k`: None for those in
    generation_config.json, or else 0.8 and 50."""

    new_tokens: int
    temperature: float | None
    top_k: int | None
    seed: int


def way_of(folder: Path, asked: Way | None) -> tuple[Way, str]:
    """Return whether the model in a folder answers a user's message or continues a text, and why.

    `asked`: the way that is asked for, or None to go by what the model was taught. RecipeError if
    it is to answer and has no template.

    A template alone means little: base models often come with the tokenizer of taught ones. Our own
    folders name the task (`finetuning_task` in config.json). Other models were taught if their
    generation ends at the end of a turn.
    """
    _require_model(folder)
    config, tokenizer = read_config(folder), _ours(folder)
    if tokenizer is None or not tokenizer.has_template:
        if asked == "chat":
            raise RecipeError(f"--chat: the tokenizer in {folder} has no chat template: leave it out")
        return "raw", "the text is continued as it is: its tokenizer has no chat template"
    if asked is not None:
        as_asked = {"chat": "asked as a user's message (--chat)", "raw": "continued as it is (--raw)"}
        return asked, f"the text is {as_asked[asked]}"
    task = config.get(TASK)
    if task is not None:
        taught, why = task in TASKS and TASKS[task].answers, f"data.task {task} trained it"
    else:
        taught = _end_of_turn(tokenizer) in ends_of(folder)
        why = f"its generation {'ends' if taught else 'does not end'} at the end of a turn"
    if taught:
        return "chat", f"the text is asked as a user's message: {why}; --raw continues it as it is"
    return "raw", f"the text is continued as it is: {why}; --chat asks it by the chat template"


def _ours(folder: Path) -> Tokenizer | None:
    """Return the folder's tokenizer as it would train here; None if it names no end of a document,
    which every chat model's does."""
    try:
        return load_tokenizer(str(folder))
    except RecipeError:
        return None


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a turn; None if the template does not write a question and its
    answer."""
    try:
        return Chat(tokenizer, seq_len=ENDLESS, learned="answers").end_of_turn
    except RecipeError:
        return None


def ends_of(folder: Path) -> list[int]:
    """Return the tokens at which generation by the model in a folder ends."""
    path = folder / GENERATION_CONFIG
    try:
        generation = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}; fix or remove the file") from None
    return as_list(generation.get("eos_token_id", read_config(folder).get("eos_token_id")))


def continue_from_folder(folder: Path, prompt: str, writing: Writing, *, way: Way = "raw") -> str:
    """Return what the model in a Hugging Face folder writes: the answer to the prompt, or the
    prompt and its continuation.

    It runs on a GPU if there is one, and writes at most `writing.new_tokens` tokens, up to where
    its generation ends or the model's last position. RecipeError for a prompt that leaves no room,
    DataError for a folder that does not load whole.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_folder(folder)
    if not prompt:
        raise RecipeError("--prompt is empty: give at least one character")
    tokens, first = (_asked(folder, prompt), []) if way == "chat" else begun(tokenizer, prompt)
    # Models with slopes (ALiBi) or state spaces have no last position.
    positions = getattr(model.config, "max_position_embeddings", sys.maxsize)
    if len(tokens) >= positions:
        raise RecipeError(f"--prompt has {len(tokens)} tokens, but the model has {positions} positions: give fewer than that")
    torch.manual_seed(derive_seed(writing.seed, "sample"))
    ids = torch.tensor([tokens], device=device)
    with torch.no_grad():
        out = model.to(device).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(writing.new_tokens, positions - len(tokens)),
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[beginning_with(first, len(tokens))],
            **_sampling(writing, model.generation_config),
        )
    shown = out[0, len(tokens) :] if way == "chat" else out[0]
    return str(tokenizer.decode(shown, skip_special_tokens=True))


def _asked(folder: Path, prompt: str) -> list[int]:
    """Return the tokens of a user's message, in the form in which the model was taught
    conversations."""
    return Chat(load_tokenizer(str(folder)), seq_len=ENDLESS, learned="answers").prompt(prompt, key="--prompt")


def begun(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that goes on, and those of which the next must be one; [] for
    any.

    What the tokenizer writes before a text is there, what it writes after is not.
    """
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    bare: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = next((n for n in range(len(tokens) - len(bare) + 1) if tokens[n : n + len(bare)] == bare), 0) + len(bare)
    return without_last_space(tokens[:after], tokenizer.convert_ids_to_tokens(range(len(tokenizer))))


def beginning_with(first: Sequence[int], prompt_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor of transformers after which the first token behind the prompt is
    one of `first`."""

    def process(ids_BS: Tensor, logits_BV: Tensor) -> Tensor:
        return only(logits_BV, first if ids_BS.shape[1] == prompt_tokens else ())

    return process


def _sampling(writing: Writing, said: Any) -> dict[str, Any]:
    """Return the settings of generation: those of the command line, else of the folder; temperature
    0 takes the likeliest token."""
    temperature = writing.temperature if writing.temperature is not None else said.temperature or TEMPERATURE
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    top_k = writing.top_k if writing.top_k is not None else said.top_k or TOP_K
    return {"do_sample": True, "temperature": temperature, "top_k": top_k}


def translates(folder: Path) -> bool:
    """Return whether the folder's model has an encoder and a decoder."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # loading it will report the error
        return False
    return config.get("is_encoder_decoder") is True


def _require_next_tokens(architectures: Sequence[str], folder: Path) -> None:
    for head, does in {"SequenceClassification": "sorts texts into classes", "MaskedLM": "guesses masked tokens"}.items():
        if any(architecture.endswith(f"For{head}") for architecture in architectures):
            raise RecipeError(f"the model in {folder} {does}: give one that continues texts")


def _require_model(folder: Path) -> None:
    remedies = {
        peft_format.CONFIG: "give the checkpoint, or write a whole model with triaxis export --merge",
        bottleneck_format.CONFIG: "give the checkpoint",
    }
    for config, remedy in remedies.items():
        if (folder / config).is_file() and not (folder / "config.json").is_file():
            raise RecipeError(f"{folder}: an adapter without the model that it belongs to: {remedy}")
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder}: no config.json there: give a Hugging Face folder, such as RUN_DIR/export")
    try:
        require_regular_below(folder)
    except OSError as error:
        raise DataError(f"{error.filename}: {told(error)}: remove it from the folder") from None


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer: no code from the folder, no pickle, and no tensor drawn at
    random."""
    _require_model(folder)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        network = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_next_tokens(network.architectures or (), folder)
        kind = AutoModelForSeq2SeqLM if network.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # The annotations of transformers lack `output_loading_info`.
        loaded = kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        model, loading = cast(tuple[nn.Module, dict[str, Any]], loaded)
    except RecipeError:
        raise
    except Exception as error:
        # transformers, tokenizers and safetensors each raise kinds of their own.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: cannot be loaded ({reason}): fetch or export it again") from error
    if loading["missing_keys"]:  # transformers would draw them at random
        raise DataError(f"{folder}: tensor {min(loading['missing_keys'])} is missing: fetch or export it again")
    if (folder / bottleneck_format.CONFIG).is_file():
        bottleneck_format.load_bottlenecks(model, folder)
    return model.eval(), tokenizer
