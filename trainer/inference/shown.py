"""A model's text on a terminal: as its tokens come, and without what would drive the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

UNKNOWN = "\ufffd"  # what bytes that are no character are decoded to
# Characters that turn the direction of what follows, and with it what a reader takes it for.
DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


class TextStream:
    """The text of tokens that come one by one: in whole characters, each shown once.

    A token's text depends on the one before it (a leading space), and may end in half a character.
    So tokens are decoded together with those of the last piece, and a piece is held back while its
    end may be half of a character.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._ids: list[int] = []
        self._last = 0  # the first token of the last piece
        self._next = 0  # the first token that is not shown

    def put(self, tokens: Sequence[int]) -> None:
        """Take further tokens, and show what is certain."""
        self._ids += tokens
        piece = self._piece()
        if piece and not piece.endswith(UNKNOWN):
            self._last, self._next = self._next, len(self._ids)
            self._show(piece)

    def end(self) -> None:
        """Show what was held back."""
        piece = self._piece()
        self._last = self._next = len(self._ids)
        if piece:
            self._show(piece)

    def _piece(self) -> str:
        before = text_of(self._tokenizer, self._ids[self._last : self._next])
        whole = text_of(self._tokenizer, self._ids[self._last :])
        if whole.startswith(before):
            return whole[len(before) :]
        # A decoder of bytes makes unknown ones of a character that has been shown, if a byte
        # that is no character follows.
        return text_of(self._tokenizer, self._ids[self._next :])


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special ones. White space stays as it is, because a stream
    cannot take any back."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def harmless(text: str) -> str:
    """Return a text with its control characters spelt out, except newlines and tabs."""
    if text.isprintable():
        return text
    return "".join(_spelt(letter) if _controls(letter) else letter for letter in text)


def _controls(letter: str) -> bool:
    return letter in DIRECTIONS or (unicodedata.category(letter) == "Cc" and letter not in "\n\t")


def _spelt(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
