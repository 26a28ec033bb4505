"""The rows that a recipe's steps train on, and the adapter that they begin with, for trainers that
are to do the same.

    python -m tuning.rows RECIPE FOLDER

The folder gets `rows.json`, a list of steps, each a list of rows, each a list of documents, each
[tokens, labels]: a label is the token that its position *is*, as transformers has it, or -100.
Filler is left out. Where the recipe tunes by an adapter, `adapter/` is that of the first step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from parallel.gather import logical_tensors
from parallel.loss import IGNORE
from trainer.checkpoint.resume_check import Resume
from trainer.data.loader import MicroBatch
from trainer.recipe import load
from trainer.run.session import Session, open_session
from trainer.tuning.adapter_folder import AdapterFormat, write_adapter

Document = tuple[list[int], list[int]]  # tokens, labels


def main(recipe: str, folder: Path) -> None:
    with open_session(load(recipe), str(folder / "runs" / "rows"), Resume("never")) as run:
        steps = [list(rows_of(batch)) for step in range(run.recipe.train.total_steps) for batch in run.data.micro_batches(step)]
        (folder / "rows.json").write_text(json.dumps(steps), encoding="utf-8")
        if run.recipe.tuning.method is not None:
            _write_adapter(run, folder / "adapter")


def rows_of(batch: MicroBatch) -> Iterator[list[Document]]:
    """Yield the documents of each row, without filler."""
    for tokens, labels, lengths in zip(batch.tokens_BS, batch.targets_BS, batch.documents.lengths, strict=True):
        places = list(pairwise(accumulate(lengths, initial=0)))
        documents = [(tokens[begin:end].tolist(), [IGNORE, *labels[begin : end - 1].tolist()]) for begin, end in places]
        yield [document for document, kept in zip(documents, _real(documents, lengths), strict=True) if kept]


def _real(documents: list[Document], lengths: tuple[int, ...]) -> list[bool]:
    """Return which documents are not filler. Of a translation's, the first half are the sources of
    those with targets."""
    learned = [any(label != IGNORE for label in labels) for _, labels in documents]
    if learned[0]:
        return learned
    pairs = sum(learned)
    return [number < pairs or is_learned for number, is_learned in enumerate(learned)]


def _write_adapter(run: Session, folder: Path) -> None:
    tensors = logical_tensors(run.engine.gathered_tensors())
    form = AdapterFormat.of(run.recipe, run.engine.network)
    write_adapter(tensors.items(), folder, dtype=torch.float32, form=form, save_beside=lambda _: None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
