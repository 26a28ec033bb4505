"""Passes over the training data: steps from passes and passes from steps, and the note in the cache
from which `check` knows them without opening any data. Neither torch nor numpy.

A pass draws as many sequences as all sources have together. Without weights it has each of them
once. With weights a source has its share of them: one may be repeated within a pass, and another
not be read to its end.

| file in data.cache_dir | contents |
|---|---|
| NAME.passes.json | for one `data` section: each source's sequences and share, and the stamp of its files |
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.schema import STDLIB, Data, Recipe
from trainer.tasks import TASKS

SHOWN_SOURCES = 5  # of several with weights, in one line


@dataclass(frozen=True)
class Drawn:
    """A source of training data: its sequences, and its share of all that are drawn."""

    name: str
    sequences: Annotated[int, Field(ge=1, lt=2**62)]
    share: Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True)
class Passes:
    """The sequences of the training data, by source."""

    sources: Annotated[tuple[Drawn, ...], Field(min_length=1)]

    @property
    def sequences(self) -> int:
        """The sequences of one pass."""
        return sum(source.sequences for source in self.sources)

    def steps(self, epochs: float, global_sequences: int) -> int:
        """Return the fewest whole steps that draw so many passes. The number counts as it is
        written: 0.1 is a tenth, though no float is."""
        return ceil(Fraction(repr(epochs)) * self.sequences / global_sequences)

    def lines(self, recipe: Recipe) -> Iterator[str]:
        """Yield how often the steps of a recipe pass over the data, and its warnings."""
        keys, passes = recipe.train, _drawn(recipe) / self.sequences
        steps = f"{keys.total_steps:,} step{'s' if keys.total_steps > 1 else ''}"
        epochs = "" if keys.epochs is None else f" (train.epochs {_spoken(keys.epochs)})"
        apart = _apart(self._of_each(recipe), passes)
        yield f"{steps}{epochs} = {_counted(passes)} over {self.sequences:,} sequences{apart}"
        yield from self.warnings(recipe)

    def warnings(self, recipe: Recipe) -> Iterator[str]:
        """Yield a warning where a source is seen more often than the task is known to gain from."""
        most, name = max(self._of_each(recipe))
        repeats = TASKS[recipe.data.task].repeats
        # a whole number of passes is rounded up to whole steps
        if most > repeats.most + recipe.batch.global_sequences / self.sequences:
            place = name if _apart(self._of_each(recipe), _drawn(recipe) / self.sequences) else "the data"
            yield f"warning: {_counted(most)} over {place}: {repeats.reason}; watch the held-out loss, or add data"

    def _of_each(self, recipe: Recipe) -> list[tuple[float, str]]:
        """Return the passes over each source, with its name."""
        drawn = _drawn(recipe)
        return [(drawn * source.share / source.sequences, source.name) for source in self.sources]


def _drawn(recipe: Recipe) -> int:
    return recipe.train.total_steps * recipe.batch.global_sequences


def _apart(of_each: Sequence[tuple[float, str]], passes: float) -> str:
    """Return the passes over each source, "" where weights do not set them apart."""
    if all(_spoken(one) == _spoken(passes) for one, _ in of_each):
        return ""
    said = [f"{_spoken(one)} over {name}" for one, name in of_each]
    more = [f"{len(said) - SHOWN_SOURCES} more sources"] * (len(said) > SHOWN_SOURCES)
    return f" (by data.sources[].weight: {', '.join([*said[:SHOWN_SOURCES], *more])})"


def _counted(passes: float) -> str:
    said = _spoken(passes)
    return f"{said} pass" if said == "1" else f"{said} passes"


def _spoken(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 1000 else f"{passes:.3g}"


@dataclass(frozen=True)
class _Note:
    """The content of the file."""

    files: str
    passes: Passes


def keep(cache_dir: Path, data: Data, passes: Passes, stamp: str) -> None:
    """Keep what was found of a data section. `stamp`: that of its files before they were read."""
    write_json(_path(cache_dir, data), {"files": stamp, "passes": asdict(passes)})


def kept(cache_dir: Path, data: Data) -> Passes | None:
    """Return what was found of a data section when it was tokenized. None if it was not, or if its
    files have changed since then."""
    try:
        note = read_as(_Note, _path(cache_dir, data))
        return note.passes if note.files == stamp_of(data) else None
    except (OSError, ValueError):
        return None


def request_of(data: Data) -> str:
    """Return the name of what a data section asks for: 32 hexadecimal digits."""
    asked = json.dumps(data.model_dump(mode="json", exclude={"workers"}), sort_keys=True)
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


def _path(cache_dir: Path, data: Data) -> Path:
    return cache_dir / f"{request_of(data)[:16]}.passes.json"


def stamp_of(data: Data) -> str:
    """Return the stamp of the files that a data section reads: another one when a file is added,
    removed or written."""
    named = [name for source in data.sources for name in (source.path, source.target_path) if name is not None]
    stamps = [[name, *_stamps(name)] for name in (*named, data.tokenizer)]
    return hashlib.blake2b(json.dumps(stamps).encode(), digest_size=16).hexdigest()


def _stamps(name: str) -> Iterator[object]:
    """Yield the stamps of a file, or of the files in a folder. What is neither changes its name."""
    if name == STDLIB:
        yield sys.version
    elif os.path.isdir(name):
        for path in sorted(_files_in(name)):
            yield from (path, *_stamp(path))
    elif os.path.isfile(name):
        yield from _stamp(name)


def _files_in(folder: str) -> Iterable[str]:
    """Yield the paths below a folder, without hidden ones, which no source reads."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing; who reads it says so
        return 0, 0
    return status.st_size, status.st_mtime_ns
