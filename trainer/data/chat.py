"""Conversations → tokens, and which of them are learned: the answers, each with the token that ends it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer import sections
from trainer.data.chat_template import ChatTemplate, Span
from trainer.data.conversations import Conversation, Message
from trainer.data.digests import fingerprint_of
from trainer.data.examples import Document, Examples, RowLayout, Tokenized
from trainer.data.fault import Fault
from trainer.data.tokenizer import Tokenizer
from trainer.errors import RecipeError

VERSION = 1  # of all that decides the tokens and targets of a conversation
# Around the spelling of a special token in a content: it is that text, not that token.
SPELT, SPELT_END = "\ufdd2", "\ufdd3"
PROBE = (Message("user", "x", False), Message("assistant", "y", True))

Learned = Literal["answers", "all"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it, before tokenizing."""

    conversation: Conversation
    text: str
    answers: list[Span]  # of characters


@dataclass(frozen=True)
class Encoded:
    """At most seq_len tokens of a conversation; `lost`: targets beyond them."""

    ids: list[int]
    is_target: npt.NDArray[np.bool_]  # bool [tokens]
    lost: int

    def cut(self, size: int) -> Encoded | None:
        """At most `size` tokens of it; None when no target is left."""
        lost = self.lost + int(self.is_target[size:].sum())
        return Encoded(self.ids[:size], self.is_target[:size], lost) if self.is_target[:size].any() else None


class Chat(Examples):
    """A tokenizer and its chat template, or ours where it has none."""

    noun = "conversations"

    def __init__(self, tokenizer: Tokenizer, *, seq_len: int, learned: Learned) -> None:
        """RecipeError when the template is not valid."""
        super().__init__(tokenizer.for_chat(), seq_len=seq_len, learned=learned)
        self._template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
        self.layout = RowLayout(seq_len)
        self._learned = learned
        spellings = sorted(self.tokenizer.special_spellings, key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, spellings)))

    @classmethod
    def from_recipe(cls, data: sections.Data, tokenizer: Tokenizer) -> Chat:
        return cls(tokenizer, seq_len=data.seq_len, learned=data.learn)

    @property
    def chat(self) -> Chat:
        return self

    @property
    def fingerprint(self) -> str:
        tokenizer = self.tokenizer
        settings = [self.settings, tokenizer.chat_template, tokenizer.special_tokens]
        return fingerprint_of(["chat", VERSION, tokenizer.fingerprint, settings])

    def tokenize(self, example: Conversation) -> Tokenized:
        rendered = self.render(example)
        encoded = self.encode(rendered)
        counts = Counter(
            read=1,
            unanswered=int(not rendered.answers),
            too_long=int(bool(rendered.answers) and encoded is None),
            truncated=int(encoded is not None and encoded.lost > 0),
            lost_targets=encoded.lost if encoded is not None else 0,
        )
        content = json.dumps([[turn.role, turn.content] for turn in example], ensure_ascii=False).encode()
        return Tokenized((Document(encoded.ids, encoded.is_target),) if encoded else (), content, counts)

    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        of_all, limit = f"of {counts['read']:,} conversations", f"{self.layout.part_tokens:,} tokens"
        lost = "answer tokens" if self._learned == "answers" else "targets"
        if counts["truncated"]:
            yield (
                f"{counts['truncated']:,} {of_all} were longer than {limit}: truncated, {counts['lost_targets']:,} {lost} lost"
            )
        if counts["too_long"]:
            yield f"{counts['too_long']:,} {of_all} left out: the first answer begins beyond {limit}"
        if counts["unanswered"]:
            yield f"{counts['unanswered']:,} {of_all} left out: no answer, or only empty ones"

    def nothing(self, counts: Mapping[str, int]) -> str:
        return (
            f"of its {counts['read']} conversations {counts['unanswered']} have no answer, and of {counts['too_long']} the "
            "first answer begins beyond data.seq_len; raise data.seq_len, or correct the path or the fields"
        )

    def render(self, conversation: Conversation) -> Rendered:
        """Fault for a conversation that the template refuses."""
        marked = tuple(Message(turn.role, self._mark_spelt(turn.content), turn.counts) for turn in conversation)
        return Rendered(conversation, *self._template.answers(marked))

    def encode(self, rendered: Rendered) -> Encoded | None:
        """None when no target is left: there is no answer, or all begin beyond seq_len tokens."""
        ids, begins, ends = self._tokens(rendered.text)
        is_target = np.zeros(len(ids), dtype=bool)
        for span in rendered.answers:
            first, last = self._span(span, rendered.text, ids, begins, ends)
            is_target[first:last] = True
        if not is_target.any():
            return None
        if not self._has_end(rendered, ids, begins):  # the template writes nothing there, and the model must learn to stop
            last = int(np.flatnonzero(is_target)[-1]) + 1
            ids, is_target = [*ids[:last], self.tokenizer.end_of_document], np.append(is_target[:last], True)
        if self._learned == "all":
            is_target[:] = True
        is_target[0] = False  # nothing comes before it
        size = int(np.flatnonzero(is_target)[-1]) + 1  # what follows the last target teaches nothing
        return Encoded(ids[:size], is_target[:size], lost=0).cut(self.layout.part_tokens)

    def prompt(self, text: str, *, key: str = "train.sample_prompt") -> list[int]:
        """The tokens after which the assistant answers a user's message; RecipeError, which names `key`, when the template
        refuses it."""
        message = Message("user", self._mark_spelt(text), False)
        try:
            return self._tokens(self._template.render([message], add_generation_prompt=True))[0]
        except Fault as fault:
            raise RecipeError(f"{key} = {text[:60]!r}: {fault}: give another, or none") from None

    @property
    def end_of_turn(self) -> int:
        """The token by which the assistant ends its turn."""
        try:
            probe = self.encode(self.render(PROBE))
        except Fault:  # it wants more than a question and an answer; the end of a document ends all
            probe = None
        return probe.ids[-1] if probe is not None else self.tokenizer.end_of_document

    def _mark_spelt(self, content: str) -> str:
        return self._spelt.sub(lambda found: f"{SPELT}{found[0]}{SPELT_END}", content)

    def _tokens(self, text: str) -> tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids, and for each the first character that it stands for and the one after its last."""
        ids: list[int] = []
        offsets: list[Span] = []
        for begin, piece, is_spelt in _pieces(text):
            piece_ids, piece_offsets = self.tokenizer.encode_with_offsets(piece, special=not is_spelt)
            ids += piece_ids
            offsets += [(begin + first, begin + end) for first, end in piece_offsets]
        places = np.array(offsets, np.int64).reshape(-1, 2)
        return ids, places[:, 0], places[:, 1]

    def _span(self, span: Span, text: str, ids: list[int], begins: Any, ends: Any) -> Span:
        """The tokens of an answer, [first, last): up to the token that ends the turn, and not what a template writes after."""
        inside = np.flatnonzero((begins < span[1]) & (ends > span[0]))
        if not len(inside):
            return 0, 0
        first, last = int(inside[0]), int(inside[-1]) + 1
        closing = [index for index in range(first, last) if ids[index] in self.tokenizer.special_ids]
        if closing and not text[ends[closing[-1]] : span[1]].strip():
            return first, closing[-1] + 1
        if last < len(ids) and ids[last] in self.tokenizer.special_ids:  # left out by a template that marks answers
            return first, last + 1
        return first, last

    def _has_end(self, rendered: Rendered, ids: list[int], begins: Any) -> bool:
        """Whether a special token follows the content of the last answer."""
        begin = rendered.answers[-1][0]
        return any(token in self.tokenizer.special_ids for token, at in zip(ids, begins, strict=True) if at >= begin)


def _pieces(text: str) -> Iterator[tuple[int, str, bool]]:
    """Where each piece begins, the piece, and whether it spells a special token that it is not."""
    at = 0
    for number, piece in enumerate(re.split(f"[{SPELT}{SPELT_END}]", text)):
        if piece:
            yield at, piece, number % 2 == 1
        at += len(piece) + 1
