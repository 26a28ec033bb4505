"""The encoding of texts and their translations: the source, and the target with the tokens that
begin and end it.

Rows are {"source": "…", "target": "…"}. Files that name these differently, or nest them in an
object, are read through `fields`: {"source": "translation.en", "target": "translation.de"}. Two
text files are read as rows line by line (`target_path`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trainer import schema
from trainer.data.digests import fingerprint_of
from trainer.data.examples import Document, Examples, RowLayout, Tokenized
from trainer.data.fault import Fault, kind_of, require_characters
from trainer.data.row_format import RowFormat
from trainer.data.tokenizer import Tokenizer

VERSION = 1  # raise it when the tokens or targets of a pair change


class Translation(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


@dataclass(frozen=True)
class TranslationRows(RowFormat):
    """The way in which the rows of a source become pairs: the field of each side."""

    source: str = "source"
    target: str = "target"

    @classmethod
    def of_source(cls, source: schema.Source) -> TranslationRows:
        if source.target_path is not None or source.fields is None:
            return cls()
        return cls(source.fields.source or "source", source.fields.target or "target")

    def example_of(self, row: Mapping[str, Any]) -> Translation:
        return Translation(_text_at(row, self.source), _text_at(row, self.target))

    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        return {name if name in row else name.partition(".")[0] for name in (self.source, self.target)}

    def texts_of(self, example: Translation) -> Iterator[str]:
        yield from example


def _text_at(row: Mapping[str, Any], place: str) -> str:
    """Return row["a"]["b"] for the place "a.b"; it must be a text."""
    value: Any = row
    for name in [place] if place in row else place.split("."):
        if not isinstance(value, Mapping) or name not in value:
            has = ", ".join(map(repr, row)) or "no field"
            raise Fault(
                f"no pair: it has {has}, and needs {place!r}; fix the row, or name its fields in data.sources[].fields, such "
                'as {"source": "en", "target": "de"}'
            )
        value = value[name]
    if not isinstance(value, str):
        raise Fault(f"{place!r} is {kind_of(value)}, not text; fix or remove the row")
    return require_characters(value, repr(place)).strip()


class Translations(Examples):
    """A writer of pairs: a row has its sources in the first half and their targets in the second,
    each `seq_len` tokens long."""

    noun = "pairs"

    def __init__(self, tokenizer: Tokenizer, *, seq_len: int) -> None:
        super().__init__(tokenizer.ending_texts(), seq_len=seq_len)
        self.layout = RowLayout(seq_len, parts=2, documents_each=2)

    @classmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Translations:
        return cls(tokenizer, seq_len=data.seq_len)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["pairs", VERSION, self.tokenizer.fingerprint, self.tokenizer.start_of_target, self.settings])

    def tokenize(self, example: Translation) -> Tokenized:
        """Return the pair as tokens. A side that is too long loses its end.

        A source keeps its last token, which says that it ends. A target loses it, so that nothing
        teaches to stop in the middle.
        """
        content = json.dumps(example, ensure_ascii=False).encode()
        source, target = map(self.tokenizer.encode, example)
        if not source or not target:
            return Tokenized((), content, Counter(read=1, empty=1))
        room, end = self.layout.capacity - 1, self.tokenizer.end_of_document
        targets = [*target, end][:room]
        lost = len(target) + 1 - len(targets)
        documents = (
            _document([*source[:room], end], is_target=False),
            _document([self.tokenizer.start_of_target, *targets], is_target=True),
        )
        counts = Counter(read=1, truncated=int(len(source) > room or lost > 0), lost_targets=lost)
        return Tokenized(documents, content, counts)

    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        of_all = f"of {counts['read']:,} pairs"
        if counts["truncated"]:
            limit, lost = f"{self.layout.capacity:,} tokens on a side", f"{counts['lost_targets']:,} targets lost"
            yield f"{counts['truncated']:,} {of_all} were longer than {limit}: truncated, {lost}"
        if counts["empty"]:
            yield f"{counts['empty']:,} {of_all} left out: a side is empty"

    def nothing(self, counts: Mapping[str, int]) -> str:
        return f"all of its {counts['read']} pairs have an empty side; correct the path or the fields"


def _document(ids: list[int], *, is_target: bool) -> Document:
    marks = np.full(len(ids), is_target)
    marks[0] = False  # nothing comes before it
    return Document(ids, marks)
