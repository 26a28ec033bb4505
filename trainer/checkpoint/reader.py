"""Ranges of logical tensors, read from the fragments that hold them.

Files are read, not mapped: pages of a mapping would count as this rank's memory until the whole
file is in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.geometry import Range, Rectangle, disjoint, overlaps
from trainer.checkpoint.manifest import Fragment, LogicalTensor, Manifest
from trainer.checkpoint.tensor_file import TORCH_DTYPES, TensorFile
from trainer.errors import DataError

BUFFER_BYTES = 16 << 20


class Reader:
    """The tensors of a checkpoint whose files have been verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._ranges: dict[str, list[tuple[Fragment, Range]]] = {}
        self._files: dict[int, TensorFile] = {}

    def read(self, name: str, state: str, wanted: Fragment, shape: tuple[int, ...]) -> Tensor:
        """Return the elements of `wanted` (whose `file` means nothing), flat, in their stored
        format, on the CPU.

        DataError if the checkpoint has no such tensor or state, or has one of another shape.
        """
        tensor = self._tensor(name, state, shape)
        target = Range.of(wanted)
        result = torch.empty(wanted.count, dtype=TORCH_DTYPES[tensor.dtypes[state]])
        parts: list[Rectangle] = []
        for fragment, source in self._fragments(name, tensor):
            for shared in overlaps(source, target):
                if fragment.transposed != wanted.transposed:
                    raise DataError(f"{self._folder}: tensor {name} is stored the other way round: not written by this version")
                self._copy(name, state, fragment, (source, target), shared, result)
                parts.append(shared)
        if missing := wanted.count - sum(part.area for part in parts):
            raise DataError(f"{self._folder}: tensor {name} ({state}): {missing} elements are in no fragment")
        if not disjoint(parts):
            raise DataError(f"{self._folder}: tensor {name} ({state}): some elements are in two fragments, others in none")
        return result

    def whole(self, name: str, state: str) -> Tensor:
        """Return a whole logical tensor."""
        tensor = self._manifest.tensors[name]
        start, transposed = (0,) * len(tensor.shape), any(fragment.transposed for fragment in tensor.fragments)
        flat = self.read(name, state, Fragment(0, start, tensor.shape, 0, tensor.numel, transposed), tensor.shape)
        return flat.view(tensor.shape[::-1]).t() if transposed else flat.view(tensor.shape)

    def _tensor(self, name: str, state: str, shape: tuple[int, ...]) -> LogicalTensor:
        tensor = self._manifest.tensors.get(name)
        if tensor is None or state not in tensor.dtypes:
            raise DataError(f"{self._folder}: no tensor {name} with the state {state}: another model or optimizer saved it")
        if tensor.shape != shape:
            raise DataError(f"{self._folder}: tensor {name} has shape {list(tensor.shape)}, the model's is {list(shape)}")
        return tensor

    def _fragments(self, name: str, tensor: LogicalTensor) -> list[tuple[Fragment, Range]]:
        if name not in self._ranges:
            self._ranges[name] = [(fragment, Range.of(fragment)) for fragment in tensor.fragments if fragment.count]
        return self._ranges[name]

    def _file(self, index: int) -> TensorFile:
        if index not in self._files:
            self._files[index] = TensorFile(self._folder / self._manifest.files[index].name)
        return self._files[index]

    def _copy(
        self, name: str, state: str, fragment: Fragment, ranges: tuple[Range, Range], shared: Rectangle, result: Tensor
    ) -> None:
        """Read the elements that a fragment and the result share, in place if they are consecutive
        in both, else through a buffer for some rows."""
        source, target = ranges
        file, key = self._file(fragment.file), fragment.key(name, state)
        rows, columns = shared.bottom - shared.top, shared.right - shared.left
        if rows == 1 or columns == source.columns == target.columns:
            at = target.index(shared.top, shared.left)
            file.read(key, source.index(shared.top, shared.left), result[at : at + shared.area])
            return
        step = max(1, BUFFER_BYTES // (source.columns * result.element_size()))
        for top in range(shared.top, shared.bottom, step):
            part = shared._replace(top=top, bottom=min(top + step, shared.bottom))
            height = part.bottom - part.top
            buffer = torch.empty((height - 1) * source.columns + columns, dtype=result.dtype)
            file.read(key, source.index(part.top, part.left), buffer)
            into = result.as_strided((height, columns), (target.columns, 1), target.index(part.top, part.left))
            into.copy_(buffer.as_strided((height, columns), (source.columns, 1)))
