"""Labelled texts: rows are read as a text with its class, and encoded as tokens with a label.

The tokens are those that the tokenizer's own folder gives in transformers, special tokens and
truncation included, so that an exported classifier reads what was trained. The classes of a source
are found before anything is tokenized, unless the recipe lists them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer import schema
from trainer.data.digests import fingerprint_of
from trainer.data.examples import Document, Examples, RowLayout, Tokenized
from trainer.data.fault import Fault, kind_of, require_characters
from trainer.data.row_format import RowFormat
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

VERSION = 1  # raise it when the tokens or the label of a text change
MAX_CLASSES = 100_000  # found in the data; a column with more is not one of labels


@dataclass(frozen=True)
class LabelledText:
    """A text with its class. `spelt`: the label as in the data, with white space around it."""

    text: str
    label: str
    spelt: str


@dataclass(frozen=True)
class LabelledRows(RowFormat):
    """A format of rows with a text and the name of its class. `fields`: our name of a field → its
    name in this source."""

    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_source(cls, source: schema.Source) -> LabelledRows:
        return cls(source.names)

    def example_of(self, row: Mapping[str, Any]) -> LabelledText:
        text, label = (self._value(row, name) for name in ("text", "label"))
        if not isinstance(text, str):
            raise Fault(f"{self._name('text')!r} is {kind_of(text)}, not text; fix or remove the row")
        spelt = self._spelt(label)
        return LabelledText(require_characters(text, repr(self._name("text"))), class_name(spelt), spelt)

    def keys_read(self, row: Mapping[str, Any]) -> set[str]:
        return {self._name("text"), self._name("label")}

    def texts_of(self, example: LabelledText) -> Iterator[str]:
        yield example.text

    def _name(self, ours: str) -> str:
        return self.fields.get(ours, ours)

    def _value(self, row: Mapping[str, Any], ours: str) -> Any:
        name = self._name(ours)
        if row.get(name) is None:
            has = ", ".join(map(repr, row)) or "no field"
            raise Fault(
                f"no {name!r}: it has {has}, and data.task classify needs a text and a label; fix the row, or name its fields "
                'in data.sources[].fields, such as {"text": "sentence", "label": "sentiment"}'
            )
        return row[name]

    def _spelt(self, label: Any) -> str:
        # A table's whole numbers where some are missing.
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int | str) or (isinstance(label, str) and not class_name(label)):
            raise Fault(f"{self._name('label')!r} is {label!r}: a label is a word or a whole number; fix or remove the row")
        if label == -1:
            raise Fault(
                f"{self._name('label')!r} is -1, by which published data hides the label of a test; leave this split out"
            )
        return require_characters(str(label), repr(self._name("label")))


def class_name(label: str) -> str:
    """Return a label without the white space or byte order mark around it: `pos` and `pos ` are one
    class."""
    return label.strip().strip("\ufeff").strip()


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of classes in order: by value if all are numbers, else alphabetically."""
    found = set(names)
    if all(name.isascii() and name.isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


class Labelled(Examples):
    """A writer of texts with a class, as one document each."""

    noun = "texts"

    def __init__(self, tokenizer: Tokenizer, *, seq_len: int, classes: list[str]) -> None:
        super().__init__(tokenizer.for_classification(), seq_len=seq_len, classes=classes)
        self.layout = RowLayout(seq_len, labelled=True)
        self.classes = tuple(classes)
        self._number = {name: number for number, name in enumerate(classes)}

    @classmethod
    def from_recipe(cls, data: schema.Data, tokenizer: Tokenizer) -> Labelled:
        return cls(tokenizer, seq_len=data.seq_len, classes=list(data.classes))

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["labelled", VERSION, self.tokenizer.fingerprint, self.settings])

    def tokenize(self, example: LabelledText) -> Tokenized:
        if example.label not in self._number:
            legal = ", ".join(map(repr, self.classes[:20]))
            raise Fault(f"the label {example.label!r} is not in data.classes ({legal}); fix the row, or add the class")
        ids, lost = self.tokenizer.encode_sequence(example.text, max_tokens=self.layout.part_tokens)
        counts = Counter(read=1, empty=int(not example.text.strip()), truncated=int(lost > 0), lost_tokens=lost)
        counts["stripped"] = int(example.spelt != example.label)
        content = json.dumps([example.text, example.label], ensure_ascii=False).encode()
        if counts["empty"]:
            return Tokenized((), content, counts)
        document = Document(ids, np.zeros(len(ids), dtype=bool), self._number[example.label])
        return Tokenized((document,), content, counts)

    def remarks(self, counts: Mapping[str, int]) -> Iterator[str]:
        if counts["truncated"]:
            yield (
                f"{counts['truncated']:,} of {counts['read']:,} texts were longer than {self.layout.part_tokens:,} tokens: "
                f"truncated, {counts['lost_tokens']:,} tokens lost"
            )
        if counts["stripped"]:
            yield f"{counts['stripped']:,} of {counts['read']:,} labels are read without the white space around them"
        if counts["empty"]:
            yield f"{counts['empty']:,} of {counts['read']:,} texts left out: empty"

    def nothing(self, counts: Mapping[str, int]) -> str:
        return f"all of its {counts['read']} texts are empty; correct the path, or data.sources[].fields"


def require_classes(names: list[str], where: str) -> list[str]:
    """Return the classes. DataError if there is only one, or there are too many to be classes."""
    if not names:
        raise DataError(f"{where}: it has no rows, so that no class is known; correct the path, or fill it")
    if len(names) < 2:
        raise DataError(f"{where}: its only label is {names[0]!r}: there is nothing to tell apart; add rows of another class")
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{where}: {len(names):,} different labels, such as {names[0]!r}: legal are up to {MAX_CLASSES:,}; is "
            "data.sources[].fields.label the right field?"
        )
    return names
