"""The encoding of conversations into tokens, and which of them are learned: the answers, each with
the token that ends it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer import schema
from trainer.data.answers import Answer, Writer, Written
from trainer.data.chat_template import ChatTemplate, Span
from trainer.data.conversations import OPTIONS, REASONING, Conversation, Message, Turns
from trainer.data.digests import fingerprint_of
from trainer.data.examples import Document, Examples, RowLayout, Tokenized
from trainer.data.fault import Fault
from trainer.data.row_format import UNREAD
from trainer.data.tokenizer import Tokenizer
from trainer.errors import RecipeError

VERSION = 2  # raise it when the tokens or targets of a conversation change
# Marks around the spelling of a special token in a content: it means that text, not that token.
SPELT, SPELT_END = "\ufdd2", "\ufdd3"
GUARDED = re.compile(f"{SPELT}([^{SPELT}{SPELT_END}]*){SPELT_END}|[{SPELT}{SPELT_END}]")
PROBE = Conversation((Message("user", "x", False), Message("assistant", "y", True)))
# Keys of turns that templates are given whether or not they name them.
TURN_KEYS = frozenset({"content", "name", "tool_calls", "tool_call_id", *REASONING})

Learned = Literal["answers", "last", "all"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it, before tokenizing."""

    conversation: Conversation
    written: Written

    @property
    def text(self) -> str:
        return self.written.text

    @property
    def answers(self) -> list[Answer]:
        return self.written.answers


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens, at most seq_len of them; `lost` counts the targets beyond them."""

    ids: list[int]
    is_target: npt.NDArray[np.bool_]  # bool [tokens]
    lost: int

    def cut(self, size: int) -> Encoded | None:
        """Return at most `size` tokens of it, or None if no target is left."""
        lost = self.lost + int(self.is_target[size:].sum())
        return Encoded(self.ids[:size], self.is_target[:size], lost) if self.is_target[:size].any() else None


class Chat(Examples):
    """A tokenizer with its chat template, or with ours if it has none."""

    noun = "conversations"

    def __init__(self, tokenizer: Tokenizer, *, seq_len: int, learned: Learned) -> None:
        """Prepare the template. RecipeError if it is not valid."""
        super().__init__(tokenizer.for_chat(), seq_len=seq_len, learned=learned)
        self.layout = RowLayout(seq_len)
        self._learned = learned
        self._spelt = re.compile("(?!)")
        self._writer = self._writer_by(self.tokenizer.chat_template)
        has_other = self.tokenizer.tool_template != self.tokenizer.chat_template
        self._tool_writer = self._writer_by(self.tokenizer.tool_template) if has_other else self._writer
        guarded = sorted(self._guarded_tokens(), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, guarded)) or "(?!)")

    def _writer_by(self, template: str) -> Writer:
        return Writer(ChatTemplate(template, self.tokenizer.special_tokens), list(self.tokenizer.added_tokens), self._guard)

    def _writer_of(self, conversation: Conversation) -> Writer:
        return self._tool_writer if conversation.tools else self._writer

    def _guarded_tokens(self) -> Iterator[str]:
        """Yield the tokens that a content may spell but not write: special ones, and others that
        separate turns.

        Tokens with which the template has contents written, such as <think>, stay tokens in
        contents, as in transformers.
        """
        try:
            structure = self._writer.prompt((*PROBE.turns, *PROBE.turns[:1]))
        except Fault:  # the template requires more than questions and answers
            structure = ""
        named = self.tokenizer.special_tokens.values()
        for token, is_special in self.tokenizer.added_tokens.items():
            if token in self.tokenizer.new_tokens:  # the recipe names it so that texts may write it
                continue
            divides = is_special or token in structure
            if token in named or (divides and not self._writer.template.has_in_contents(token)):
                yield token

    @classmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Chat:
        return cls(tokenizer, seq_len=data.seq_len, learned=data.learn)

    @property
    def chat(self) -> Chat:
        return self

    @property
    def fingerprint(self) -> str:
        tokenizer = self.tokenizer
        templates = [tokenizer.chat_template, tokenizer.tool_template]
        settings = [self.settings, *dict.fromkeys(templates), tokenizer.special_tokens]
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
        counts.update(self.left_out(rendered))
        content = json.dumps(example.told, ensure_ascii=False).encode()
        return Tokenized((Document(encoded.ids, encoded.is_target),) if encoded else (), content, counts)

    def left_out(self, rendered: Rendered) -> Iterator[str]:
        """Yield what the template omits from a conversation, each kind once, for counts."""
        conversation, written = rendered.conversation, rendered.written
        mentioned = self._writer_of(conversation).template.mentioned
        known = TURN_KEYS | mentioned
        if written.cut:
            yield "cut_answers"
        if written.mute:
            yield "mute_turns"
        if conversation.tools and "tools" not in mentioned:
            yield "tools"
        yield from {f"{UNREAD}{key} of a turn" for turn in conversation.turns for key in turn.keys if key not in known}
        yield from (f"{UNREAD}{OPTIONS}.{key}" for key in conversation.options if key not in mentioned)

    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        of_all, limit = f"of {counts['read']:,} conversations", f"{self.layout.part_tokens:,} tokens"
        lost = "targets" if self._learned == "all" else "answer tokens"
        if counts["truncated"]:
            yield (
                f"{counts['truncated']:,} {of_all} were longer than {limit}: truncated, {counts['lost_targets']:,} {lost} lost"
            )
        if counts["too_long"]:
            yield f"{counts['too_long']:,} {of_all} left out: the first answer begins beyond {limit}"
        if counts["unanswered"]:
            yield f"{counts['unanswered']:,} {of_all} left out: no answer, or only empty ones"
        yield from unwritten(counts, of_all)

    def nothing(self, counts: Mapping[str, int]) -> str:
        return (
            f"of its {counts['read']} conversations {counts['unanswered']} have no answer, and of {counts['too_long']} the "
            "first answer begins beyond data.seq_len; raise data.seq_len, or correct the path or the fields"
        )

    def render(self, conversation: Conversation) -> Rendered:
        """Return the conversation as written. Fault if the template refuses it or writes nothing of
        its answers."""
        return Rendered(conversation, self._writer_of(conversation).write(conversation))

    def encode(self, rendered: Rendered) -> Encoded | None:
        """Return the tokens, or None if no target is left: there is no answer, or all answers begin
        beyond seq_len tokens."""
        ids, begins, ends = self._tokens(rendered.text)
        is_target = np.zeros(len(ids), dtype=bool)
        answers = rendered.answers[-1:] if self._learned == "last" else rendered.answers
        ended = False
        for answer in answers:
            first, last, ended = self._span(answer, rendered.text, ids, begins, ends)
            is_target[first:last] = True
        if not is_target.any():
            return None
        if not ended:  # the template writes nothing there, and the model must learn to stop
            last = int(np.flatnonzero(is_target)[-1]) + 1
            ids, is_target = [*ids[:last], self.tokenizer.end_of_document], np.append(is_target[:last], True)
        if self._learned == "all":
            is_target[:] = True
        is_target[0] = False  # nothing comes before it
        # What follows the last target teaches nothing.
        size = int(np.flatnonzero(is_target)[-1]) + 1
        return Encoded(ids[:size], is_target[:size], lost=0).cut(self.layout.part_tokens)

    def prompt(self, text: str, *, key: str = "train.sample_prompt") -> list[int]:
        """Return the tokens after which the assistant answers a user's message.

        RecipeError, which names `key`, if the template refuses the message.
        """
        try:
            return self.asked((Message("user", text, False),))
        except Fault as fault:
            raise RecipeError(f"{key} = {text[:60]!r}: {fault}: give another, or none") from None

    def asked(self, turns: Turns) -> list[int]:
        """Return the tokens after which the assistant answers the last of the turns. Fault if the
        template refuses them."""
        return self._tokens(self._writer.prompt(turns))[0]

    @property
    def end_of_turn(self) -> int:
        """The token with which the assistant ends its turn."""
        try:
            probe = self.encode(self.render(PROBE))
        except Fault:  # the template requires more than a question and an answer
            probe = None
        return probe.ids[-1] if probe is not None else self.tokenizer.end_of_document

    def _guard(self, text: str) -> str:
        """Return a row's text with marks around the special tokens that it spells."""
        return self._spelt.sub(lambda found: f"{SPELT}{found[0]}{SPELT_END}", text)

    def _tokens(self, text: str) -> tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the token ids, and for each the first character that it stands for and the one
        after its last."""
        ids: list[int] = []
        offsets: list[Span] = []
        for begin, piece, is_spelt in _pieces(text):
            piece_ids, piece_offsets = self.tokenizer.encode_with_offsets(piece, special=not is_spelt)
            ids += piece_ids
            offsets += [(begin + first, begin + end) for first, end in piece_offsets]
        places = np.array(offsets, np.int64).reshape(-1, 2)
        return ids, places[:, 0], places[:, 1]

    def _span(
        self, answer: Answer, text: str, ids: list[int], begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> tuple[int, int, bool]:
        """Return the tokens of an answer, [first, last), and whether the last one ends the turn.

        The last one ends the turn if it is an added token behind the content, with only white space
        after it, or the added token with which the following text begins.
        """
        inside = np.flatnonzero((begins < answer.end) & (ends > answer.begin))
        if not len(inside):
            return 0, 0, False
        first, last = int(inside[0]), int(inside[-1]) + 1
        # Compared by their ends, because some tokens begin with the white space before them.
        behind = (ends > answer.said) & (ends <= answer.end)
        closing = [at for at in range(first, last) if behind[at] and ids[at] in self.tokenizer.added_ids]
        if closing and not text[ends[closing[-1]] : answer.end].strip():
            return first, closing[-1] + 1, True
        if last < len(ids) and ids[last] in self.tokenizer.added_ids:
            return first, last + 1, True
        return first, last, False


def unwritten(counts: Mapping[str, int], of_all: str) -> Iterator[str]:
    """Yield remarks on what the template omits from rows."""
    if counts["cut_answers"]:
        yield f"{counts['cut_answers']:,} {of_all}: the chat template leaves out a part of an answer, such as its thought"
    if counts["mute_turns"]:
        yield f"{counts['mute_turns']:,} {of_all}: the chat template leaves out a turn, such as the system's"
    if counts["tools"]:
        yield f"{counts['tools']:,} {of_all} have tools, which the chat template does not write"


def _pieces(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield, for each piece, its first character's index, the piece, and whether it only spells a
    special token.

    A mark without its counterpart, which the template cut off, marks nothing.
    """
    at = 0
    for found in GUARDED.finditer(text):
        if at < found.start():
            yield at, text[at : found.start()], False
        if found[1]:
            yield found.start(1), found[1], True
        at = found.end()
    if at < len(text):
        yield at, text[at:], False
