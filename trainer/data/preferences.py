"""The encoding of pairs of answers: each answer with its prompt is a document, and the two of a
pair lie in one row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping

from trainer import schema
from trainer.data.chat import Chat, Encoded, Rendered, unwritten
from trainer.data.digests import fingerprint_of
from trainer.data.examples import Document, Examples, RowLayout, Tokenized
from trainer.data.pairs import Pair
from trainer.data.tokenizer import Tokenizer

VERSION = 2  # raise it when the tokens or targets of a pair change


class Preferences(Examples):
    """A tokenizer with the chat template in which both conversations of a pair are written.

    Each conversation of a pair longer than a row is truncated to half a row. A pair is left out if
    an answer is missing, before or after truncation, or if both answers are the same.
    """

    noun = "pairs"

    def __init__(self, tokenizer: Tokenizer, *, seq_len: int) -> None:
        """Prepare the chat template. RecipeError if it is not valid."""
        self._chat = Chat(tokenizer, seq_len=seq_len, learned="answers")
        super().__init__(self._chat.tokenizer, seq_len=seq_len)
        self.layout = RowLayout(seq_len, documents_each=2)

    @classmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Preferences:
        return cls(tokenizer, seq_len=data.seq_len)

    @property
    def chat(self) -> Chat:
        return self._chat

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["preferences", VERSION, self._chat.fingerprint])

    def tokenize(self, example: Pair) -> Tokenized:
        conversations = (example.chosen, example.rejected)
        told = [conversation.told for conversation in conversations]
        content = json.dumps(told, ensure_ascii=False).encode()
        if told[0] == told[1]:
            return Tokenized((), content, Counter(read=1, same=1))
        rendered = [self._chat.render(conversation) for conversation in conversations]
        if not all(one.answers for one in rendered):
            return Tokenized((), content, Counter(read=1, unanswered=1))
        answers, cut = self._that_fit(rendered)
        if answers is None:
            return Tokenized((), content, Counter(read=1, too_long=1))
        counts = Counter(read=1, truncated=int(cut), lost_targets=sum(answer.lost for answer in answers))
        counts.update({what for one in rendered for what in self._chat.left_out(one)})
        return Tokenized(tuple(Document(answer.ids, answer.is_target) for answer in answers), content, counts)

    def _that_fit(self, rendered: list[Rendered]) -> tuple[list[Encoded] | None, bool]:
        """Return both conversations, to fit in one row, and whether they had to be truncated."""
        encoded = [self._chat.encode(one) for one in rendered]
        whole = [one for one in encoded if one is not None]
        if len(whole) < len(encoded):
            return None, True
        row_tokens = self.layout.row_tokens
        if not any(one.lost for one in whole) and sum(len(one.ids) for one in whole) <= row_tokens:
            return whole, False
        kept = [shorter for one in whole if (shorter := one.cut(row_tokens // 2)) is not None]
        return (kept if len(kept) == len(whole) else None), True

    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        of_all, limit = f"of {counts['read']:,} pairs", f"{self.layout.row_tokens:,} tokens"
        if counts["truncated"]:
            yield (
                f"{counts['truncated']:,} {of_all} were longer than {limit}: each answer with its prompt truncated to half of "
                f"that, {counts['lost_targets']:,} answer tokens lost"
            )
        if counts["too_long"]:
            yield f"{counts['too_long']:,} {of_all} left out: longer than {limit}, and an answer begins beyond half of that"
        if counts["unanswered"]:
            yield f"{counts['unanswered']:,} {of_all} left out: an answer is missing or empty"
        if counts["same"]:
            yield f"{counts['same']:,} {of_all} left out: both answers are the same"
        yield from unwritten(counts, of_all)

    def nothing(self, counts: Mapping[str, int]) -> str:
        return (
            f"of its {counts['read']} pairs {counts['unanswered']} lack an answer, {counts['same']} have twice the same, and "
            f"in {counts['too_long']} an answer begins beyond half of data.seq_len; raise data.seq_len, or correct the path or "
            "the fields"
        )
