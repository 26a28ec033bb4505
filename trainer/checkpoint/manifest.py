"""The manifest of a checkpoint, `manifest.json`. No torch.

A checkpoint holds logical tensors under Hugging Face's names, as fragments that know no layout: a
box of the logical tensor and a range of that box's flattening. Every element of every state of a
tensor is in exactly one fragment. Fragments that follow each other evenly are written as one run,
so the manifest grows with the model and not with the ranks; only its list of files does.

The manifest is one JSON object in one canonical form, and ends with the SHA-256 of that form
without the digest. So every byte of it counts: a file that parses, but differs in a byte from what
its own content is written as, is damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic reads typing's own from Python 3.12 on
    Self,
)

from pydantic import Field, with_config
from typing_extensions import TypedDict

from parallel.pieces import Fragment, Piece
from trainer.checkpoint.runs import Run, Stored, joined
from trainer.errors import DataError
from trainer.files.decoding import CLOSED, OPEN, decode
from trainer.files.reading import read_bytes, told

MANIFEST = "manifest.json"
# Bytes of a manifest: some ten million fragments; a file with a hole may claim any length.
LONGEST = 1 << 30
FORMAT = "triaxis checkpoint 2"
EARLIER_FORMAT = "triaxis checkpoint 1"  # the same without runs
# The name of a file in a checkpoint: no part begins with a point, so none leads out.
FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,127}/){0,3}[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# safetensors' names, with bytes per element.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


# The manifest as it is written down. Keys that are read are declared, so that nobody who uses a
# manifest needs to check them again.
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Figure = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | Number
# A file's number; start and size of a box, offset and count of the range in it, and 1 if
# transposed.
Flag = Annotated[int, Field(ge=0, le=1, strict=True)]
StoredJSON = tuple[Count, list[Count], list[Count], Count, Count, Flag]
# A run: behind the same the number of fragments, and how many files they are apart.
Repeats = Annotated[int, Field(ge=2, lt=2**63, strict=True)]
Stride = Annotated[int, Field(ge=1, lt=2**63, strict=True)]
RunJSON = tuple[Count, list[Count], list[Count], Count, Count, Flag, Repeats, Stride]
TensorJSON = tuple[list[Count], dict[str, str], list[StoredJSON | RunJSON]]


@with_config(OPEN)
class _GuardMemory(TypedDict, total=False):
    skipped_in_a_row: Count
    not_finite_since: Count
    loss: list[Number]
    grad_norm: list[Number]


class _Evaluation(TypedDict):
    """The evaluation after the step; figures {} without one."""

    data: str
    figures: dict[str, Figure]


@with_config(OPEN)
class _Memory(TypedDict, total=False):
    guard: _GuardMemory
    meter: dict[Literal["skipped"], Count]
    data: dict[Literal["skipped_steps"], Count]
    evaluation: _Evaluation


class _LossScale(TypedDict):
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    good_steps: Count
    overflows_left: Count


@with_config(OPEN)
class _State(TypedDict):
    updates: Count
    loss_scale: _LossScale
    memory: _Memory


@with_config(OPEN)
class _Precision(TypedDict):
    dtype: Literal["fp32", "bf16", "fp16"]


@with_config(OPEN)
class _Recipe(TypedDict):
    model: dict[str, Any]
    data: dict[str, Any]
    precision: _Precision


class _Layout(TypedDict):
    pp: Count
    dp: Count
    cp: Count
    tp: Count
    zero: Count


_Facts = TypedDict("_Facts", {"batch.global_sequences": NotRequired[Annotated[int, Field(ge=1, strict=True)]]})
_Facts.__pydantic_config__ = OPEN  # type: ignore[attr-defined]  # a name with a point in it has no class form


@with_config(CLOSED)
class _Body(TypedDict):
    step: Count
    sequences: Count
    time: Annotated[float, Field(ge=0.0, lt=253_402_300_800)]  # to the end of the year 9999
    recipe: _Recipe
    facts: _Facts
    layout: _Layout
    state: _State
    versions: dict[str, str]
    files: list[tuple[str, Count, str]]
    tensors: dict[str, TensorJSON]


@dataclass(frozen=True)
class LogicalTensor:
    """The shape of a logical tensor, the format of each of its states, and its fragments in
    runs."""

    shape: tuple[int, ...]
    dtypes: dict[str, str]
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtypes: dict[str, str], fragments: Iterable[Stored]) -> Self:
        """Return the tensor that has these fragments."""
        return cls(shape, dtypes, joined(Run(file, fragment) for file, fragment in fragments))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * sum(DTYPE_BYTES[dtype] for dtype in self.dtypes.values())

    def beside(self, other: Self) -> Self:
        """Return the tensor with what other ranks, all behind these, hold of it."""
        return replace(self, dtypes=self.dtypes | other.dtypes, runs=joined((*self.runs, *other.runs)))

    def renumbered(self, numbers: Mapping[int, int]) -> Self:
        """Return the tensor with other numbers of files, by their present ones."""
        fragments = (stored for run in self.runs for stored in run.stored())
        return replace(self, runs=joined(Run(numbers[file], fragment) for file, fragment in fragments))

    def as_json(self) -> list[Any]:
        """Return the manifest's entry for the tensor, below its name."""
        return [list(self.shape), self.dtypes, [_run_as_json(run) for run in self.runs]]

    @classmethod
    def from_json(cls, name: str, value: TensorJSON) -> Self:
        dims, dtypes, entries = value
        shape = tuple(dims)
        return cls(shape, dict(dtypes), tuple(_run_from_json(name, shape, entry) for entry in entries))


def _run_as_json(run: Run) -> list[Any]:
    """Return the manifest's entry for a run, below the name and shape of its tensor."""
    piece, first = run.first.piece, run.first
    entry = [run.file, list(piece.start), list(piece.size), first.offset, first.count, int(piece.transposed)]
    return [*entry, run.repeats, run.stride] if run.repeats > 1 else entry


def _run_from_json(name: str, shape: tuple[int, ...], value: Sequence[Any]) -> Run:
    file, start, size, offset, count, transposed, *repeated = value
    piece = Piece(name, shape, tuple(start), tuple(size), transposed=bool(transposed))
    return Run(file, Fragment(piece, offset, count), *repeated)


def key_of(fragment: Fragment, state: str) -> str:
    """Return the name of a fragment's state inside its safetensors file."""
    piece = fragment.piece
    return f"{state}:{piece.name}:{','.join(map(str, piece.start))}:{fragment.offset}"


def _is_part(fragment: Fragment, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of that shape can have been cut into this fragment.

    Only matrices are cut along their second dimension.
    """
    start, size, transposed = fragment.piece.start, fragment.piece.size, fragment.piece.transposed
    if not len(start) == len(size) == len(shape) or (transposed and len(shape) != 2):
        return False
    if any(first + length > dim for first, length, dim in zip(start, size, shape, strict=True)):
        return False
    is_cut_once = len(shape) <= 2 or (not any(start[1:]) and size[1:] == shape[1:])
    return is_cut_once and fragment.offset + fragment.count <= fragment.piece.numel


@dataclass(frozen=True)
class File:
    name: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes) -> Self:
        return cls(name, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint without its tensors.

    | field | meaning |
    |---|---|
    | `step` | optimizer steps done, skipped ones included |
    | `sequences` | training sequences consumed; the next is this one, counted from 0 |
    | `time` | when it was saved [s since the epoch] |
    | `recipe` | every value of the recipe that saved it, without secrets |
    | `facts` | what must be the same to go on: see `resume.py` |
    | `layout` | degrees and ZeRO stage in which it was saved; nobody needs them to read it |
    | `state` | what the run remembers beside tensors: loss scale, counters, history |
    | `versions` | of the packages |
    """

    step: int
    sequences: int
    time: float
    recipe: dict[str, Any]
    facts: dict[str, Any]
    layout: dict[str, Any]
    state: dict[str, Any]
    versions: dict[str, str]
    files: tuple[File, ...] = ()
    tensors: dict[str, LogicalTensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def not_finite_since(self) -> int | None:
        """The first step since when no loss was finite; None if the last one was."""
        since: int | None = self.state.get("memory", {}).get("guard", {}).get("not_finite_since")
        return since

    def as_json(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in vars(self).items() if key not in ("files", "tensors")},
            "files": [[file.name, file.num_bytes, file.sha256] for file in self.files],
            "tensors": {name: tensor.as_json() for name, tensor in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return the manifest that `as_json` has described, which nobody doubts."""
        files = tuple(File(*entry) for entry in body["files"])
        tensors = {name: LogicalTensor.from_json(name, tensor) for name, tensor in body["tensors"].items()}
        return cls(**{**body, "files": files, "tensors": tensors})

    def encode(self) -> bytes:
        return _seal({"format": FORMAT, **self.as_json()})

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the manifest that these bytes hold.

        ValueError with what is wrong: first its own checksum, then anything that does not fit
        together.
        """
        unsealed = _unseal(data)
        if unsealed.pop("format", None) not in (FORMAT, EARLIER_FORMAT):
            raise ValueError(f"not in the format {FORMAT!r}")
        manifest = cls.from_json({**decode(_Body, unsealed)})
        manifest.require_sound()
        return manifest

    def require_sound(self) -> None:
        """Raise ValueError if the manifest could not be read again.

        Its file names may not lead out of the folder, and its fragments must make up their tensors.
        """
        for file in self.files:
            if not FILE_NAME.fullmatch(file.name):
                raise ValueError(f"file name {file.name!r} leads out of the folder")
        if len({file.name for file in self.files}) < len(self.files):
            raise ValueError("a file is listed twice")
        for name, tensor in self.tensors.items():
            if not tensor.dtypes or not DTYPE_BYTES.keys() >= set(tensor.dtypes.values()):
                raise ValueError(f"tensor {name} has the formats {tensor.dtypes}")
            if not all(0 <= run.file <= run.last_file < len(self.files) for run in tensor.runs):
                raise ValueError(f"tensor {name} is in a file that is not listed")
            if not all(_is_part(run.together, tensor.shape) for run in tensor.runs):
                raise ValueError(f"a fragment of tensor {name} is no part of its shape {list(tensor.shape)}")
            if sum(run.together.count for run in tensor.runs) != tensor.numel:
                raise ValueError(f"the fragments of tensor {name} do not make its shape {list(tensor.shape)}")
        if (needed := sum(tensor.num_bytes for tensor in self.tensors.values())) > self.num_bytes:
            raise ValueError(f"its tensors have {needed:,} bytes, its files {self.num_bytes:,}")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest in a folder; DataError, with the file, if it is missing, unreadable
        or damaged."""
        path = folder / MANIFEST
        try:
            return cls.decode(read_bytes(path, LONGEST, follow=False))
        except OSError as error:
            raise DataError(f"{path}: {told(error)}: not a complete checkpoint") from None
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error})") from None


def _seal(body: Mapping[str, Any]) -> bytes:
    return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def _unseal(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)  # a UnicodeDecodeError or JSONDecodeError is a ValueError
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    sealed = dict(body)
    digest = body.pop("sha256", None)
    if _canonical(sealed) != data or hashlib.sha256(_canonical(body)).hexdigest() != digest:
        raise ValueError("its checksum does not match")
    return body


def _canonical(value: Mapping[str, Any]) -> bytes:
    # Keys stay in their order: the model's tensors are listed as they come.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"
