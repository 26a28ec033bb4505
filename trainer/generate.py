"""Text from a model: during a run from its engine, afterwards from an exported folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from parallel.rng import derive_seed
from trainer.errors import DataError, RecipeError
from trainer.tuning import bottleneck_format, peft_format


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
) -> list[int]:
    """Continue `prompt` by at most `new_tokens` tokens, up to `end`.

    The model sees the last `context` tokens. Every rank that takes part draws the same tokens: the stream depends on
    the seed only. temperature 0 takes the likeliest token.
    """
    stream = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits = next_logits(tokens[-context:])
        if temperature == 0.0:
            token = int(logits.argmax())
        else:
            best = torch.topk(logits / temperature, min(top_k, logits.numel()))
            token = int(best.indices[torch.multinomial(best.values.softmax(-1), 1, generator=stream)])
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def continue_from_folder(folder: Path, prompt: str, *, new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and its continuation by the model in a Hugging Face folder, on a GPU when there is one.

    At most `new_tokens` tokens, up to the end of the document or the model's last position. RecipeError for a prompt that
    leaves no room, DataError for a folder that does not load whole.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_folder(folder)
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    length = tokens["input_ids"].shape[1]
    # Slopes (ALiBi) and state spaces have no last position.
    positions = getattr(model.config, "max_position_embeddings", sys.maxsize)
    if length == 0:
        raise RecipeError("--prompt is empty: give at least one character")
    if length >= positions:
        raise RecipeError(f"--prompt has {length} tokens, but the model has {positions} positions: give fewer than that")
    torch.manual_seed(derive_seed(seed, "sample"))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        out = model.to(device).generate(
            **tokens, max_new_tokens=min(new_tokens, positions - length), pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def translates(folder: Path) -> bool:
    """Whether the folder's model has an encoder and a decoder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says so
        return False
    return isinstance(config, dict) and config.get("is_encoder_decoder") is True


def _require_next_tokens(architectures: Sequence[str], folder: Path) -> None:
    for head, does in {"SequenceClassification": "sorts texts into classes", "MaskedLM": "guesses masked tokens"}.items():
        if any(architecture.endswith(f"For{head}") for architecture in architectures):
            raise RecipeError(f"the model in {folder} {does}: give one that continues texts")


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; no code from the folder, no pickle, no tensor left to chance."""
    remedies = {
        peft_format.CONFIG: "give the checkpoint, or write a whole model with triaxis export --merge",
        bottleneck_format.CONFIG: "give the checkpoint",
    }
    for config, remedy in remedies.items():
        if (folder / config).is_file() and not (folder / "config.json").is_file():
            raise RecipeError(f"{folder}: an adapter without the model that it belongs to: {remedy}")
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder}: no config.json there: give a Hugging Face folder, such as RUN_DIR/export")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        network = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_next_tokens(network.architectures or (), folder)
        kind = AutoModelForSeq2SeqLM if network.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # transformers' types know of no `output_loading_info`.
        loaded = kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        model, loading = cast(tuple[nn.Module, dict[str, Any]], loaded)
    except RecipeError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each raise kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: cannot be loaded ({reason}): fetch or export it again") from error
    if loading["missing_keys"]:  # transformers would draw them at random
        raise DataError(f"{folder}: tensor {min(loading['missing_keys'])} is missing: fetch or export it again")
    if (folder / bottleneck_format.CONFIG).is_file():
        bottleneck_format.load_bottlenecks(model, folder)
    return model.eval(), tokenizer
