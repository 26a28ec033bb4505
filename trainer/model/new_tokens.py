"""The tokens that a recipe adds to a tokenizer: the check of their names, and their rows in the
network. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.schema import Finding, Recipe

KEY = "data.new_tokens"
LISTED = 8  # tokens named in a message


def new_token_findings(recipe: Recipe) -> Iterator[Finding]:
    for token, times in Counter(recipe.data.new_tokens).items():
        if times > 1:
            yield Finding((KEY,), f"{KEY} names {json.dumps(token)} {times} times: once is enough")
        if not token.strip():
            yield Finding((KEY,), f"{KEY}: {json.dumps(token)} is white space, which texts are full of: name something rare")


def growth_findings(recipe: Recipe, network: TransformerConfig) -> Iterator[Finding]:
    """Yield where two embeddings would have to grow for one tokenizer."""
    if recipe.data.new_tokens and network.source_vocab_size is not None:
        yield Finding(
            (KEY, "model.from_pretrained", "model.config.share_encoder_decoder_embeddings"),
            f"{KEY}: this {network.family} has an embedding for each of its two vocabularies, and the tokens would be in one; "
            "remove it, or take a network whose sides share one",
        )


def grown(hf_config: Mapping[str, Any], vocab_size: int, num_new: int) -> dict[str, Any]:
    """Return the config of a folder whose weights get rows for new tokens.

    It is unchanged unless all symbols of the tokenizer beyond the folder's rows are among the
    `num_new` last.
    """
    keys = [key for key in ("vocab_size", "decoder_vocab_size") if isinstance(hf_config.get(key), int)]
    grows = keys and all(vocab_size - num_new <= hf_config[key] < vocab_size for key in keys)
    return {**hf_config, **dict.fromkeys(keys if grows else (), vocab_size)}


def number_at_the_end(vocab_size: int, new_tokens: Collection[int]) -> int:
    """Return how many of the last symbols are new."""
    return next(n for n in range(vocab_size + 1) if vocab_size - 1 - n not in new_tokens)


def stand_ins(number: int, vocab_size: int) -> tuple[int, ...]:
    """Return ids for so many tokens whose numbers are not known yet, spread over the vocabulary, so
    that every tensor rank has some."""
    return tuple(dict.fromkeys(vocab_size * (2 * place + 1) // (2 * number) for place in range(number)))


class Symbols(Protocol):
    """A tokenizer, as far as its symbols matter here."""

    vocab_size: int

    def from_number(self, first: int) -> Mapping[str, bool]: ...


def require_rows(place: str | Path, rows: object, tokenizer: Symbols, named: Collection[str]) -> None:
    """Raise RecipeError for symbols beyond the rows of a folder's embedding that the recipe does
    not name. `rows`: None where its config does not say."""
    if not isinstance(rows, int) or tokenizer.vocab_size <= rows:
        return
    beyond = {token: is_added for token, is_added in tokenizer.from_number(rows).items() if token not in named}
    said = f"{place}: the weights have {rows} rows of embedding, and data.tokenizer has {tokenizer.vocab_size} symbols"
    if ordinary := [token for token, is_added in beyond.items() if not is_added]:
        raise RecipeError(
            f"{said}, among them ordinary ones that the weights do not know ({_listed(ordinary)}): it is another model's "
            "tokenizer; give the one that came with the weights"
        )
    if beyond:
        raise RecipeError(
            f"{said}: those that were added to it have no rows; name them, {KEY} {_listed(list(beyond))}, and they get rows "
            "that learn"
        )


def _listed(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - LISTED} more" if len(tokens) > LISTED else ""
    return json.dumps(list(tokens[:LISTED]), ensure_ascii=False) + more
