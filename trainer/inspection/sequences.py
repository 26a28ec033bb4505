"""Sequences as training's own loader gives them, divided into the documents that they hold.

Ids and labels are those of the loader's `MicroBatch`; nothing is tokenized or packed a second time.
What a sequence cannot tell is added from beside it: the row of the source that each document came
from, and what of that row was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt

from parallel.loss import IGNORE
from trainer.data import PreparedData
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.origins import Origins
from trainer.data.sampling import Window, held_out_windows
from trainer.data.store import TokenStore
from trainer.errors import RecipeError
from trainer.inspection.parts import Part, Reading
from trainer.schema import Recipe
from trainer.tasks import TASKS

SEARCHED_PASSES = 4  # over the data, for the step in which a sequence is learned first


@dataclass(frozen=True)
class Shown:
    """A sequence of a step, or of an evaluation.

    `ids` and `labels`, int64 [tokens], are those of the loader. `following`: the target of the last
    position, which stands in the next sequence; "" for none. `focus`: the row that was asked for.
    """

    title: str
    where: str
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    parts: tuple[Part, ...]
    following: str = ""
    focus: int | None = None

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE).sum())

    def shows(self, part: Part) -> bool:
        """Return whether a part is to be shown in full, and not as a neighbour."""
        return self.focus is None or part.row == self.focus


@dataclass(frozen=True)
class Inspection:
    """The prepared data of a recipe in training's own order. `evaluation`: None if nothing is held
    out."""

    recipe: Recipe
    prepared: PreparedData
    training: TrainData
    evaluation: EvalData | None

    def first(self, number: int) -> Iterator[Shown]:
        """Yield the first sequences that training takes."""
        for sample in range(number):
            yield self._trained(sample)

    def row(self, number: int) -> tuple[list[Shown], list[str]]:
        """Return the first sequence that holds a row of data.sources, counted from 1 over all of
        them, or none; and what became of the row. RecipeError if there is no such row."""
        source, row = self._source_of(number)
        origins, store = self._origins[source], self.prepared.train[source]
        said = f"row {number:,} is {origins.place(row)}"
        if len(documents := origins.documents_of(row)):
            return [replace(self._with_document(source, int(documents[0])), focus=row)], [said]
        for held, (held_rows, held_store) in enumerate(zip(self._eval_origins, self.prepared.evaluation, strict=True)):
            if held_store.path.parent == store.path.parent and len(documents := held_rows.documents_of(row)):
                found = self._evaluated_with(held, int(documents[0]))
                beyond = "" if found else "; evaluations end before it (train.eval_sequences)"
                return [replace(one, focus=row) for one in found], [f"{said}: held out, never learned{beyond}"]
        return [], [f"{said}: it is in no sequence", *self._why_left_out(origins, row)]

    def _source_of(self, number: int) -> tuple[int, int]:
        row = number - 1
        for source, origins in enumerate(self._origins):
            if row < origins.num_rows:
                return source, row
            row -= origins.num_rows
        total = sum(origins.num_rows for origins in self._origins)
        raise RecipeError(f"--row {number}: data.sources have {total:,} rows: give one of them, counted from 1")

    def _why_left_out(self, origins: Origins, row: int) -> Iterator[str]:
        examples = self.prepared.examples
        if examples is None:
            yield "left out: it has no token"
            return
        for _, example in origins.examples([row]):
            yield from examples.remarks(examples.tokenize(example).counts)

    # --------------------------------------------------------------------------- of which sequence

    def _with_document(self, source: int, document: int) -> Shown:
        sample = self._sequence_of(self.prepared.train[source], document)
        passes = SEARCHED_PASSES * self.training.num_samples
        number = self.training.first_time(source, sample, within=passes)
        if number is None:
            raise RecipeError(
                f"data.sources[{source}].weight is so small that this row is not learned in {passes:,} sequences: raise it"
            )
        return self._trained(number)

    def _evaluated_with(self, source: int, document: int) -> list[Shown]:
        """Return the sequence of evaluations that holds a document; [] if they end before it."""
        begin = self._sequence_of(self.prepared.evaluation[source], document) * self.recipe.data.row_tokens
        return [self._evaluated(number) for number, w in enumerate(self._windows) if (w.store, w.begin) == (source, begin)]

    def _sequence_of(self, store: TokenStore, document: int) -> int:
        """Return the sequence of a store in which a document begins."""
        return int(store.documents[document : document + 1][0]) // self.recipe.data.row_tokens

    @cached_property
    def _windows(self) -> list[Window]:
        sizes = [store.num_tokens for store in self.prepared.evaluation]
        return held_out_windows(sizes, self.recipe.data.row_tokens, self.recipe.train.eval_sequences)

    @cached_property
    def _origins(self) -> list[Origins]:
        return [Origins.of(*pair) for pair in zip(self.prepared.train, self.prepared.corpora, strict=True)]

    @cached_property
    def _eval_origins(self) -> list[Origins]:
        return [Origins.of(*pair) for pair in zip(self.prepared.evaluation, self.prepared.eval_corpora, strict=True)]

    def _trained(self, number: int) -> Shown:
        """Return the sequence with that number, counted from 0 over the whole run."""
        each = self.recipe.batch.global_sequences
        step, index = divmod(number, each)
        (batch,) = islice(self.training.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1), index, index + 1)
        source, sample = self.training.place_of(number)
        title = f"step {step + 1:,}, sequence {index + 1:,} of {each:,}"
        where = f"sequence {sample + 1:,} of {self.prepared.sources[source]}"
        return self._shown(title, where, batch, self.prepared.train[source], sample, self._origins[source])

    def _evaluated(self, number: int) -> Shown:
        assert self.evaluation is not None
        (batch,) = islice(self.evaluation.micro_batches(dp_rank=0, dp=1, micro_sequences=1), number, number + 1)
        window = self._windows[number]
        sample = window.begin // self.recipe.data.row_tokens
        title = f"evaluation, sequence {number + 1:,} of {self.evaluation.num_sequences:,}"
        where = f"sequence {sample + 1:,} of {self.prepared.eval_sources[window.store]}, held out"
        store, origins = self.prepared.evaluation[window.store], self._eval_origins[window.store]
        return self._shown(title, where, batch, store, sample, origins)

    def _shown(self, title: str, where: str, batch: MicroBatch, store: TokenStore, sample: int, origins: Origins) -> Shown:
        ids, labels = batch.tokens_BS[0].numpy(), batch.targets_BS[0].numpy()
        reading = Reading(self.recipe.data, self.prepared, store, origins, sample * len(ids), ids, labels)
        following = ""
        if TASKS[self.recipe.data.task].target == "next" and labels[-1] != IGNORE:
            following = self.prepared.tokenizer.decode([int(labels[-1])])
        return Shown(title, where, ids, labels, tuple(reading.parts()), following)
