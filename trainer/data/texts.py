"""The encoding of a text as a document: an opening, the text's tokens, and the token that ends
documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from trainer import schema
from trainer.data.tokenizer import Tokenizer
from trainer.errors import RecipeError


@dataclass(frozen=True)
class Texts:
    """A way to write texts.

    `opening`: the tokens before each text. With `parse` a special token that a text spells is that
    token; without it, text.
    """

    opening: tuple[int, ...] = ()
    parse: bool = False

    @classmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Self:
        """Build it from the recipe. RecipeError if documents are to begin with a token that the
        tokenizer does not have."""
        return cls(_opening(data, tokenizer), data.special_tokens == "parse")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(tuple(settings["opening"]), settings["parse"])

    @property
    def settings(self) -> dict[str, Any]:
        """The values from which `from_settings` rebuilds it, as JSON."""
        return asdict(self)

    @property
    def facts(self) -> list[Any]:
        """The values that distinguish its documents from plain tokens, as JSON; [] if nothing
        does."""
        return ["texts", self.settings] if self.opening or self.parse else []

    def documents(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text's document; [] for a text without a token."""
        end = tokenizer.end_of_document
        return [[*self._opened(ids), end] if ids else [] for ids in tokenizer.encode_batch(texts, special=self.parse)]

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the tokens that a model continues, at least one."""
        return self._opened(tokenizer.encode(text, special=self.parse)) or [tokenizer.end_of_document]

    def _opened(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens behind the opening. A rendered conversation spells its own opening, and
        no model was trained on two."""
        spells_it = self.parse and tuple(ids[: len(self.opening)]) == self.opening
        return list(ids) if spells_it else [*self.opening, *ids]

    def note(self, tokenizer: Tokenizer) -> str:
        parts = [*map(tokenizer.spelling_of, self.opening), "its text", tokenizer.spelling_of(tokenizer.end_of_document)]
        kind = 'that token (data.special_tokens "parse")' if self.parse else 'text (data.special_tokens "text")'
        return f"data: a document is {' + '.join(parts)} (data.bos); a special token that a text spells is {kind}"


def _opening(data: schema.Data, tokenizer: Tokenizer) -> tuple[int, ...]:
    if data.bos is None:
        return tokenizer.opening
    if not data.bos:
        return ()
    if tokenizer.bos is None:
        raise RecipeError(
            f"data.bos = true, but the tokenizer {data.tokenizer} has no bos_token: remove data.bos, or name one in its "
            "tokenizer_config.json"
        )
    return tokenizer.opening if tokenizer.bos in tokenizer.opening else (tokenizer.bos,)
