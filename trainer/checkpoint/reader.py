"""Ranges of logical tensors, read from the fragments that hold them.

Files are read, not mapped: pages of a mapping would count as this rank's memory until the whole
file is in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel.pieces import Fragment, Piece
from trainer.checkpoint.geometry import Rectangle, box_of, disjoint, index, overlaps
from trainer.checkpoint.manifest import LogicalTensor, Manifest, key_of
from trainer.checkpoint.runs import Stored
from trainer.checkpoint.tensor_file import TORCH_DTYPES, TensorFile
from trainer.errors import DataError

BUFFER_BYTES = 16 << 20


class Reader:
    """The tensors of a checkpoint whose files have been verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files: dict[int, TensorFile] = {}

    def read(self, wanted: Fragment, state: str) -> Tensor:
        """Return the elements of `wanted` in this state, flat, in their stored format, on the CPU.

        DataError if the checkpoint has no such tensor or state, or has one of another shape.
        """
        name = wanted.piece.name
        tensor = self._tensor(wanted.piece, state)
        result = torch.empty(wanted.count, dtype=TORCH_DTYPES[tensor.dtypes[state]])
        parts: list[Rectangle] = []
        for stored in (stored for run in tensor.runs for stored in run.meeting(wanted)):
            for shared in overlaps(stored.fragment, wanted):
                if stored.fragment.piece.transposed != wanted.piece.transposed:
                    raise DataError(f"{self._folder}: tensor {name} is stored the other way round: not written by this version")
                self._copy(stored, state, wanted, shared, result)
                parts.append(shared)
        if missing := wanted.count - sum(part.area for part in parts):
            raise DataError(f"{self._folder}: tensor {name} ({state}): {missing} elements are in no fragment")
        if not disjoint(parts):
            raise DataError(f"{self._folder}: tensor {name} ({state}): some elements are in two fragments, others in none")
        return result

    def whole(self, name: str, state: str) -> Tensor:
        """Return a whole logical tensor."""
        tensor = self._manifest.tensors[name]
        transposed = any(run.first.piece.transposed for run in tensor.runs)
        flat = self.read(Fragment.whole(Piece.whole(name, tensor.shape, transposed=transposed)), state)
        return flat.view(tensor.shape[::-1]).t() if transposed else flat.view(tensor.shape)

    def _tensor(self, piece: Piece, state: str) -> LogicalTensor:
        """Return the tensor that a piece is of."""
        tensor = self._manifest.tensors.get(piece.name)
        if tensor is None or state not in tensor.dtypes:
            raise DataError(
                f"{self._folder}: no tensor {piece.name} with the state {state}: another model or optimizer saved it"
            )
        if tensor.shape != piece.shape:
            raise DataError(
                f"{self._folder}: tensor {piece.name} has shape {list(tensor.shape)}, the model's is {list(piece.shape)}"
            )
        return tensor

    def _file(self, index: int) -> TensorFile:
        if index not in self._files:
            self._files[index] = TensorFile(self._folder / self._manifest.files[index].name)
        return self._files[index]

    def _copy(self, stored: Stored, state: str, wanted: Fragment, shared: Rectangle, result: Tensor) -> None:
        """Read the elements that a stored fragment and the wanted one share, in place if they are
        consecutive in both, else through a buffer for some rows."""
        source, file, key = stored.fragment, self._file(stored.file), key_of(stored.fragment, state)
        stride, stride_wanted = box_of(source.piece).width, box_of(wanted.piece).width
        if shared.height == 1 or shared.width == stride == stride_wanted:
            at = index(wanted, shared.top, shared.left)
            file.read(key, index(source, shared.top, shared.left), result[at : at + shared.area])
            return
        step = max(1, BUFFER_BYTES // (stride * result.element_size()))
        for top in range(shared.top, shared.bottom, step):
            part = shared._replace(top=top, bottom=min(top + step, shared.bottom))
            buffer = torch.empty((part.height - 1) * stride + part.width, dtype=result.dtype)
            file.read(key, index(source, part.top, part.left), buffer)
            into = result.as_strided((part.height, part.width), (stride_wanted, 1), index(wanted, part.top, part.left))
            into.copy_(buffer.as_strided((part.height, part.width), (stride, 1)))
