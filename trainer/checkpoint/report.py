"""A report of what ranks have saved, and how two reports become one.

A report is JSON, in the forms of the manifest, and names files by the ranks that wrote them.
Neighbours' shares of a tensor join into runs as soon as they meet, so the report of all ranks
together is about as long as that of one rank of each pipeline stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from trainer.checkpoint.folder import HUGGING_FACE
from trainer.checkpoint.manifest import File, LogicalTensor, Manifest, TensorJSON
from trainer.checkpoint.runs import Stored
from trainer.checkpoint.tensor_file import DTYPES
from trainer.engine.zero_state import StateFragment


class Report(TypedDict):
    """The files and tensors that some ranks have written.

    * `failures`: why some could not, each with its rank.
    * `not_finite`: the tensors that hold NaN or infinity.
    * `written`: the ranks that have a file of tensors, in their order.
    * `files`: the entries of these files, in the same order; `beside`: those of other files.
    * `tensors`: the manifest's entries, with ranks for files.
    """

    failures: list[str]
    not_finite: list[str]
    written: list[int]
    files: list[list[Any]]
    beside: list[list[Any]]
    tensors: dict[str, Any]


def of_rank(rank: int, outcome: Mapping[str, Any]) -> Report:
    """Return one rank's report: of its files and tensors, or of its failure."""
    beside = [entry for entry in outcome.get("files", ()) if entry[0].startswith(f"{HUGGING_FACE}/")]
    own = [entry for entry in outcome.get("files", ()) if entry not in beside]
    return Report(
        failures=[f"rank {rank}: {outcome['failure']}"] if "failure" in outcome else [],
        not_finite=[outcome["not_finite"]] if "not_finite" in outcome else [],
        written=[rank for _ in own],
        files=own,
        beside=beside,
        tensors=outcome.get("tensors", {}),
    )


def described(rank: int, fragments: Sequence[StateFragment]) -> dict[str, Any]:
    """Return the manifest's entries for what a rank holds. States lie in the same fragments, each
    of which is listed once."""
    dtypes: dict[str, dict[str, str]] = {}
    held: dict[str, list[Stored]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for fragment, state, dtype in fragments:
        name = fragment.piece.name
        shapes[name] = fragment.piece.shape
        dtypes.setdefault(name, {})[state] = DTYPES[dtype]
        held.setdefault(name, []).append(Stored(rank, fragment))
    return {name: LogicalTensor.of(shape, dtypes[name], held[name]).as_json() for name, shape in shapes.items()}


def both(report: Report, other: Report) -> Report:
    """Return one report of two; `other` is of the ranks behind."""
    tensors = report["tensors"] | {
        name: _beside(name, report["tensors"][name], entry) if name in report["tensors"] else entry
        for name, entry in other["tensors"].items()
    }
    return Report(
        failures=report["failures"] + other["failures"],
        not_finite=report["not_finite"] + other["not_finite"],
        written=report["written"] + other["written"],
        files=report["files"] + other["files"],
        beside=report["beside"] + other["beside"],
        tensors=tensors,
    )


def _beside(name: str, entry: TensorJSON, other: TensorJSON) -> list[Any]:
    return LogicalTensor.from_json(name, entry).beside(LogicalTensor.from_json(name, other)).as_json()


def completed(manifest: Manifest, report: Report) -> Manifest:
    """Return the manifest with all ranks' files and tensors."""
    files = tuple(File(*entry) for entry in report["files"] + report["beside"])
    tensors = {name: LogicalTensor.from_json(name, entry) for name, entry in report["tensors"].items()}
    numbers = {rank: number for number, rank in enumerate(report["written"])}
    # a rank that holds nothing has no file
    if any(rank != number for rank, number in numbers.items()):
        tensors = {name: tensor.renumbered(numbers) for name, tensor in tensors.items()}
    return replace(manifest, files=files, tensors=tensors)
