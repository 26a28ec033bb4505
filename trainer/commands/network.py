"""The facts about a recipe's network that are known before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.output import say

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.model.config import TransformerConfig
    from trainer.recipe import ResolvedRecipe
    from trainer.schema import Recipe


def known_network(resolved: ResolvedRecipe) -> TransformerConfig | None:
    """Return the network if it is known without opening the tokenizer, the hub or transformers,
    else None."""
    from trainer.model.auto_rules import AUTO
    from trainer.recipe import tokenizer_vocab_size

    if resolved.recipe.model.family == AUTO:
        return None
    vocab_size = tokenizer_vocab_size(resolved.recipe.data)
    known = resolved.hf_config is not None and (vocab_size is not None or "vocab_size" in resolved.hf_config)
    return resolved.network(vocab_size=vocab_size) if known else None


def show_model(console: Console, resolved: ResolvedRecipe, network: TransformerConfig | None) -> None:
    from trainer.costs.blocks import count_parameters
    from trainer.model.auto_rules import AUTO

    if network is None and resolved.hf_config is not None and resolved.recipe.model.family == AUTO:
        say(console, f"model: {resolved.hf_config['model_type']}, as transformers builds it when training starts")
        return
    if network is None:
        say(console, f"model: known once {_missing_part(resolved)} is opened")
        return
    say(
        console,
        f"model: {network.family}, {count_parameters(network):,} parameters: {network.num_layers} layers, hidden "
        f"{network.hidden_size}, {network.num_heads} heads, vocabulary {network.vocab_size:,}",
    )


def show_stages(console: Console, resolved: ResolvedRecipe, network: TransformerConfig | None) -> None:
    if resolved.recipe.parallel.pipeline == 1:
        return
    if network is None:
        say(console, f"stages: known once {_missing_part(resolved)} is opened")
        return
    from trainer.commands.timeline import division

    for line in division(resolved.recipe, network):
        say(console, line)


def show_template(console: Console, recipe: Recipe) -> None:
    """Say which chat template conversations are written with, where there are some."""
    from trainer.chat_templates.named import said
    from trainer.tasks import TASKS

    if TASKS[recipe.data.task].answers:
        say(console, said(recipe.data.chat_template, has_own=_has_template(recipe.data.tokenizer)))


def _has_template(tokenizer: str) -> bool | None:
    """Return whether a tokenizer brings a chat template; None if it must be fetched to know."""
    from trainer.files.reading import read_json
    from trainer.recipe.names import tokenizer_is_ours

    folder = Path(tokenizer)
    if tokenizer_is_ours(tokenizer):
        return False
    if not folder.is_dir():
        return None
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    try:
        return config.is_file() and bool(read_json(config).get("chat_template"))
    except (OSError, ValueError):
        return None


def _missing_part(resolved: ResolvedRecipe) -> str:
    if resolved.hf_config is None:
        return f"model.from_pretrained {json.dumps(resolved.recipe.model.from_pretrained)}"
    return f"data.tokenizer {json.dumps(resolved.recipe.data.tokenizer)}"
