"""The documents of one sequence: which row each is, what of it is learned, what was cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from parallel.loss import IGNORE
from trainer.data import PreparedData
from trainer.data.examples import Examples
from trainer.data.origins import NO_ROW, Origins
from trainer.data.store import TokenStore
from trainer.data.tasks import written_again
from trainer.inspection.pieces import Piece, spelt
from trainer.schema import Data
from trainer.tasks import TASKS

WHOLE = 1 << 24  # tokens: longer than any row, to see what a shorter limit cut off


@dataclass(frozen=True)
class Part:
    """A document of a sequence: its tokens [begin, end).

    `row`: of its source, from 0; None for what fills up a sequence. `place`: where that row stands.
    `role`: what the document is, such as "chosen". `label`: its class. `remarks`: what is not in
    this sequence. `lost`: the text that was cut off.
    """

    begin: int
    end: int
    pieces: tuple[Piece, ...]
    role: str = ""
    row: int | None = None
    place: str = ""
    label: str = ""
    remarks: tuple[str, ...] = ()
    lost: str = ""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Reading:
    """A sequence that is being divided: the tokens from `begin` of `store` on, with the loader's
    ids and labels, int64 [tokens]."""

    data: Data
    prepared: PreparedData
    store: TokenStore
    origins: Origins
    begin: int
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def parts(self) -> Iterator[Part]:
        length = min(len(self.ids), self.store.num_tokens - self.begin - 1)
        cuts = np.unique([0, *self.store.document_ends(self.begin, self.begin + length), length]).tolist()
        first = self.store.documents.searchsorted([self.begin], "right")[0] - 1
        rows = self.origins.rows[first : first + len(cuts) - 1].tolist()
        cut_off = self._cut_off({row for row in rows if row != NO_ROW})
        for number, (begin, end, row) in enumerate(zip(cuts, cuts[1:], rows, strict=False)):
            pieces = self._pieces(begin, end)
            if row == NO_ROW:
                yield Part(begin, end, pieces)
                continue
            role, index = self._role(number, begin)
            remarks, lost = cut_off.get((row, index), ((), ""))
            remarks = (*self._elsewhere(first + number, begin, end), *remarks)
            yield Part(begin, end, pieces, role, row, self.origins.place(row), self._label(begin, end), remarks, lost)
        if length < len(self.ids):
            yield Part(length, len(self.ids), self._pieces(length, len(self.ids)))

    def _role(self, number: int, begin: int) -> tuple[str, int]:
        """Return what a document is, and which of its row's documents."""
        task, examples = TASKS[self.data.task], self.prepared.examples
        if examples is None:
            return "document", 0
        layout = examples.layout
        index = begin // layout.part_tokens if layout.parts > 1 else number % layout.documents_each
        if task.translates:
            return ("source", "target")[index], index
        return ("chosen", "rejected")[index] if task.compares else examples.noun.removesuffix("s"), index

    def _label(self, begin: int, end: int) -> str:
        """Return the class of a document, as the loader has it: its name, and where it is
        predicted."""
        if TASKS[self.data.task].target != "label":
            return ""
        at = begin + np.flatnonzero(self.labels[begin:end] != IGNORE)
        return ", ".join(
            f"{self.prepared.classes[number]} (class {number}, predicted at token {place})"
            for place, number in zip(at.tolist(), self.labels[at].tolist(), strict=True)
        )

    def _elsewhere(self, document: int, begin: int, end: int) -> Iterator[str]:
        """Yield what of a text is in other sequences."""
        if self.prepared.examples is not None:
            return
        whole = self.store.documents[document : document + 2].tolist()
        if before := self.begin + begin - whole[0]:
            yield f"its first {before:,} tokens are in earlier sequences"
        if behind := whole[1] - (self.begin + end):
            yield f"its last {behind:,} tokens are in later sequences"

    def _pieces(self, begin: int, end: int) -> tuple[Piece, ...]:
        tokenizer, masked = self.prepared.tokenizer, TASKS[self.data.task].target == "masked"
        found = []
        is_learned = self._is_learned[begin:end].tolist()
        for first, last, text in spelt(tokenizer, self.ids[begin:end].tolist(), is_learned):
            at, learned = slice(begin + first, begin + last), is_learned[first]
            special = not tokenizer.added_ids.isdisjoint(self.ids[at].tolist())
            original = tokenizer.decode(self.labels[at].tolist()) if masked and learned else ""
            found.append(Piece(at.start, at.stop, text, learned, special, original))
        return tuple(found)

    @cached_property
    def _is_learned(self) -> npt.NDArray[np.bool_]:
        """The tokens that are predicted, bool [tokens]."""
        is_target: npt.NDArray[np.bool_] = self.labels != IGNORE
        match TASKS[self.data.task].target:
            case "next":
                return np.concatenate([[False], is_target[:-1]])
            case "masked":
                return is_target
            case "label":
                return np.zeros_like(is_target)

    def _cut_off(self, rows: set[int]) -> dict[tuple[int, int], tuple[tuple[str, ...], str]]:
        """Return, for each document that lost something, by its row and its number in it, a remark
        and the text that was lost.

        The task's own writer tells, with its limit and without.
        """
        examples = self.prepared.examples
        if examples is None:
            return {}
        unlimited = written_again(self.data.task, examples.tokenizer, {**examples.settings, "seq_len": WHOLE})
        assert isinstance(unlimited, Examples)
        found: dict[tuple[int, int], tuple[tuple[str, ...], str]] = {}
        for row, example in self.origins.examples(rows):
            kept, whole = (writer.tokenize(example).documents for writer in (examples, unlimited))
            for index, (short, long) in enumerate(zip(kept, whole, strict=True)):
                if lost := _lost(short.ids, long.ids):
                    remark = f"cut after {len(short.ids):,} tokens: {len(lost):,} more do not fit"
                    found[row, index] = ((remark,), self.prepared.tokenizer.decode(lost))
        return found


def _lost(short: Sequence[int], long: Sequence[int]) -> list[int]:
    """Return the tokens that a shortened document lacks, whose end may have been kept."""
    if len(short) >= len(long):
        return []
    alike = next((n for n, (one, other) in enumerate(zip(short, long, strict=False)) if one != other), len(short))
    return list(long[alike : len(long) - (len(short) - alike)])
