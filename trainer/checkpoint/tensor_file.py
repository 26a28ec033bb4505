"""A safetensors file, written as a stream: its header first, then one tensor after another, hashed
on the way.

The safetensors package needs all tensors of a file in memory at once, which a rank whose optimizer
state is on NVMe cannot have. The format (https://github.com/huggingface/safetensors#format) is 8
bytes of header length, the header as JSON, and the raw little-endian values in its order. For the
same reason a file is read by ranges, not mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.checkpoint.manifest import DTYPE_BYTES, File
from trainer.errors import DataError
from trainer.files.durable import private_file
from trainer.files.reading import open_regular

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
CHUNK_BYTES = 16 << 20  # bytes copied to host memory, hashed and written at a time


@dataclass(frozen=True)
class Slot:
    """A tensor of a file before it is written: safetensors' name of its format, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size


def write_tensor_file(
    path: Path, slots: Mapping[str, Slot], tensors: Iterable[Tensor], *, metadata: Mapping[str, str] | None = None
) -> File:
    """Write tensors to a new private file that is on disk when this returns.

    They must come in the order of their slots, and are converted to the formats there. OSError if
    the file cannot be written, ValueError for a tensor of another shape.
    """
    digest, written = hashlib.sha256(), 0
    with private_file(path, must_be_new=True) as file:
        for part in _parts(slots, tensors, metadata):
            file.write(part)
            digest.update(part)
            written += len(part)
    return File(path.name, written, digest.hexdigest())


def header_bytes(slots: Mapping[str, Slot], metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, slot in slots.items():
        header[name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.num_bytes],
        }
        position += slot.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned in a mapping of the file
    return len(text).to_bytes(8, "little") + text


def _parts(
    slots: Mapping[str, Slot], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    yield header_bytes(slots, metadata)
    for (name, slot), tensor in zip(slots.items(), tensors, strict=True):
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name}: {list(tensor.shape)} where {list(slot.shape)} was announced")
        for chunk in chunks(tensor):
            yield as_bytes(chunk.to(TORCH_DTYPES[slot.dtype]))


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the flattened tensor in pieces of host memory, so that converting and hashing need
    memory for one at a time."""
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu()


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a flat tensor, in place if it is contiguous."""
    # One element may claim any stride.
    flat = values.contiguous().as_strided((values.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file to read ranges from. It is open only during a read."""

    def __init__(self, path: Path) -> None:
        """Read the header. DataError if there is no such file, or if its header does not describe
        it."""
        self._path = path
        try:
            with open_regular(path, follow=False) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= num_bytes - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {num_bytes}")
                header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            header.pop("__metadata__", None)
            self._slots: dict[str, Any] = header
            self._values_at = 8 + length
            self._require_tiled(num_bytes - self._values_at)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None

    def _require_tiled(self, num_bytes: int) -> None:
        """Raise ValueError unless the tensors lie one after another, each as large as its shape
        says, and fill the file."""
        position = 0
        for name, slot in sorted(self._slots.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = slot["data_offsets"]
            size = Slot(slot["dtype"], tuple(slot["shape"])).num_bytes
            if {type(begin), type(end)} != {int} or begin != position or end - begin != size:
                raise ValueError(f"{name} is not where and as large as it should be")
            position = end
        if position != num_bytes:
            raise ValueError(f"{num_bytes} bytes of values where {position} are described")

    @property
    def numel(self) -> int:
        """The number of elements of all its tensors."""
        return sum(math.prod(slot["shape"]) for slot in self._slots.values())

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._slots[name]["dtype"]]

    def read(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, contiguous and of the stored format, with the elements from `first` on of a
        flat tensor.

        DataError if they are not there.
        """
        try:
            begin, stop = self._slots[name]["data_offsets"]
            size, held = out.element_size(), (stop - begin) // out.element_size()
            if self.dtype(name) != out.dtype or not 0 <= first <= first + out.numel() <= held:
                raise ValueError(f"{out.numel()} elements of {out.dtype} from {first} on, of {held} of {self.dtype(name)}")
            with open_regular(self._path, follow=False) as file:
                file.seek(self._values_at + begin + first * size)
                read_into(file, as_bytes(out))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self._path}: {name} cannot be read ({type(error).__name__}: {error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def read_into(file: BinaryIO, buffer: memoryview) -> None:
    """Fill the buffer from the file. ValueError if the file ends before."""
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"the file ends {len(buffer)} bytes early")
        buffer = buffer[count:]
