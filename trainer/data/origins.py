"""The row of a source that each document of a store came from: written beside the stores, for those
who look at the data. Training does not read it.

    rows/main.bin, rows/held_out.bin    little-endian i8 [documents]: the row, from 0 over all
                                        shards of the source; -1 for what fills up a sequence
    rows/shards.json                    how many rows each shard has
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field
from typing_extensions import TypedDict

from trainer.data.array_file import ArrayFile
from trainer.data.readers import Shard
from trainer.data.sources import TEXT_KINDS, Corpus
from trainer.data.store import TokenStore
from trainer.errors import DataError
from trainer.files.decoding import read_as
from trainer.files.durable import make_private, private_file, sync_folder, write_json
from trainer.files.reading import told

FOLDER = "rows"
NO_ROW = -1
READ = 1 << 20  # documents read at once


def write_origins(folder: Path, rows_of: Mapping[str, npt.NDArray[np.int64]], shard_rows: Sequence[int]) -> None:
    """Write, for each store in `folder` by name, the row of each document, int64 [documents].
    `shard_rows`: how many rows each shard has."""
    make_private(folder / FOLDER)
    for name, rows in rows_of.items():
        with private_file(folder / FOLDER / f"{name}.bin") as file:
            file.write(np.ascontiguousarray(rows, "<i8").data)
    write_json(folder / FOLDER / "shards.json", {"rows": list(shard_rows)})
    sync_folder(folder / FOLDER)


class _Shards(TypedDict):
    rows: list[Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class Origins:
    """The rows of a store's documents, and the places of rows in their source."""

    corpus: Corpus
    rows: ArrayFile
    # The first row of each shard, and the number of all.
    firsts: tuple[int, ...]

    @classmethod
    def of(cls, store: TokenStore, corpus: Corpus) -> Self:
        """Read what `write_origins` left. DataError if it is missing, as beside stores of an
        earlier version, or damaged."""
        folder = store.path.parent
        try:
            shard_rows = read_as(_Shards, folder / FOLDER / "shards.json")["rows"]
            rows = ArrayFile(folder / FOLDER / f"{store.path.name}.bin", np.dtype("<i8"))
            if len(rows) != store.num_documents or len(shard_rows) != len(corpus.shards):
                raise ValueError("it is of other data")
        except FileNotFoundError:
            raise DataError(
                f"{folder}: an earlier version tokenized it, and did not note which row became which document: delete it, and "
                "the next command makes it again, with the same tokens"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / FOLDER}: damaged: {told(error)}; delete {folder} to tokenize again") from None
        return cls(corpus, rows, (0, *accumulate(shard_rows)))

    @property
    def num_rows(self) -> int:
        return self.firsts[-1]

    def documents_of(self, row: int) -> npt.NDArray[np.int64]:
        """Return the documents of the store that came from a row, int64 [documents]."""
        found = [begin + np.flatnonzero(self.rows[begin : begin + READ] == row) for begin in range(0, len(self.rows), READ)]
        return np.concatenate(found).astype(np.int64)

    def place(self, row: int) -> str:
        """Return where a row stands, as a user finds it: a file and the number in it, from 1."""
        number, index = self._shard_of(row)
        shard = self.corpus.shards[number]
        if shard.kind in TEXT_KINDS:
            return shard.files[index].name
        if len(shard.files) != 1:
            return f"{self.corpus.name}, row {row + 1:,}"
        alike = (self.firsts[n] for n, other in enumerate(self.corpus.shards) if other.files == shard.files)
        return f"{shard.files[0].name}, row {row - next(alike) + 1:,}"

    def examples(self, rows: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Yield rows with their examples, as the source has them. Each shard is read once, up to
        the last row that is asked for."""
        wanted: dict[int, set[int]] = {}
        for row in rows:
            number, index = self._shard_of(row)
            wanted.setdefault(number, set()).add(index)
        for number, indices in sorted(wanted.items()):
            for index, example in enumerate(_records(self.corpus.shards[number])):
                if index in indices:
                    yield self.firsts[number] + index, example
                if index >= max(indices):
                    break

    def _shard_of(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return number, row - self.firsts[number]


def _records(shard: Shard) -> Iterator[Any]:
    return shard.documents() if shard.format is None else shard.examples(lambda example: example)
