"""The text that each token of a sequence stands for, and how untrusted text is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from trainer.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8  # tokens that may make one character
# Control characters besides newline and tab, the ends of lines of other alphabets, and marks that
# turn the direction of writing: data must not drive a terminal, or show itself in another order.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sequence, [first, end), that spell `text` together.

    `learned`: they are targets. `special`: they are added tokens, such as those around a turn.
    `original`: what is to be guessed behind a masked token.
    """

    first: int
    end: int
    text: str
    learned: bool = False
    special: bool = False
    original: str = ""


def spelt(tokenizer: Tokenizer, ids: Sequence[int], learned: Sequence[bool]) -> list[tuple[int, int, str]]:
    """Return (first, end, text) for the fewest tokens that make whole characters, all `learned` or
    none.

    A decoder writes a token otherwise at the beginning of a text, so each is decoded behind those
    before it.
    """
    found = []
    prefix = first = 0
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[prefix:first]), tokenizer.decode(ids[prefix:end])
        is_whole = len(now) > len(before) and not now.endswith(UNFINISHED)
        if is_whole or end - first >= LONGEST_CHARACTER or end == len(ids) or learned[end] != learned[end - 1]:
            found.append((first, end, now[len(before) :]))
            prefix, first = first, end
    return found


def visible(text: str) -> str:
    """Return a text with its control characters written out, as in a Python string; newlines and
    tabs stay."""
    return _INVISIBLE.sub(lambda mark: _written_out(mark[0]), text)


def _written_out(mark: str) -> str:
    code = ord(mark)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def excerpt(text: str, most: int) -> str:
    """Return the beginning of a text in one line, of at most `most` characters."""
    line = " ".join(visible(text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def runs(pieces: Iterable[Piece]) -> Iterator[tuple[bool, list[Piece]]]:
    """Yield consecutive pieces that are all learned, or all not, together."""
    for learned, group in groupby(pieces, key=lambda piece: piece.learned):
        yield learned, list(group)
