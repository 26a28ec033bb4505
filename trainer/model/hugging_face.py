"""The weights of Hugging Face folders: safetensors, read by slices and written tensor by tensor.

Nothing is unpickled: a folder that has only `pytorch_model.bin` is refused with the command that
converts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.params import ShardSpec, owned_specs, zero_padding
from parallel.pieces import Piece
from trainer.errors import DataError, RecipeError
from trainer.files.durable import replacing_folder
from trainer.files.reading import read_json, require_regular, require_regular_below, told
from trainer.model.config_file import read_config as read_config
from trainer.model.finite import Rounding, is_finite, overflow

NamedTensor = tuple[str, Tensor]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_BYTES = 4 << 30
COMPARED_ROWS = 4096  # rows of a weight that are in memory at a time where all of it is read
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that older checkpoints of these families carry; they hold no weights.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "embeddings.position_ids", ".embed_positions.weight")
# Bert's first checkpoints, the best known among them, have these names for the weights of their
# norms; transformers reads both.
LEGACY = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def local_folder(name: str, revision: str | None, *, code: bool = False) -> Path:
    """Return a folder as it is, or fetch a hub name into the hub's own cache and return its folder
    there.

    Config, safetensors and tokenizer are fetched, with `code` *.py too.
    """
    folder = Path(name)
    if folder.is_dir():
        try:
            require_regular_below(folder)
        except OSError as error:
            raise DataError(f"{error.filename}: {told(error)}: remove it from the folder") from None
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of a dozen classes
        raise RecipeError(
            f"model.from_pretrained = {name!r} is not a folder here and could not be fetched from the hub "
            f"({type(error).__name__}): give an existing folder, or fetch it on a machine with network first"
        ) from error


def weights_file(folder: Path) -> str | None:
    """Return the file of weights, or of their index, that transformers loads.

    It is the one that config.json names, else a single file before an index of several. DataError
    where config.json names a file that is missing.
    """
    named = _named_weights(folder)
    if named is None:
        return next((file for file in (SINGLE, INDEX) if (folder / file).is_file()), None)
    if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", INDEX_SUFFIX)):
        raise DataError(
            f"{folder / 'config.json'}: transformers_weights = {named!r} is no file of weights beside it: remove it"
        )
    if not (folder / named).is_file():
        raise DataError(f"{folder / 'config.json'}: transformers_weights = {named!r} is not there: fetch the folder again")
    return named


def _named_weights(folder: Path) -> Any:
    return read_config(folder).get("transformers_weights") if (folder / "config.json").is_file() else None


def unread_weights(folder: Path) -> list[str]:
    """Return a remark where a folder has weights beside those that are loaded, such as the rest of
    an earlier save."""
    file = weights_file(folder)
    if file is None:
        return []
    indexed = read_index(folder / file).values() if file.endswith(INDEX_SUFFIX) else ()
    there = {path.name for path in folder.glob("*.safetensors*") if path.name.endswith((".safetensors", INDEX_SUFFIX))}
    unread = sorted(there - {file, *indexed}, key=lambda name: (not name.endswith(INDEX_SUFFIX), name))
    return [f"{folder}: the weights are those of {file}, as in transformers; not read: {_names(unread)}"] if unread else []


def _names(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def read_index(index: Path) -> dict[str, str]:
    """Return {tensor: file}. DataError where the index is damaged, or a file is in another
    folder."""
    try:
        entries = dict(read_json(index)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index}: no valid weight_map ({error}): fetch the folder again") from error
    for name, file in entries.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise DataError(f"{index}: tensor {name} points outside the folder ({file!r}): do not use this folder")
    return entries


class PretrainedWeights:
    """The logical tensors of a Hugging Face folder. Only the boxes asked for are read.

    A file is open, and mapped, only while one box is read: the pages of a lasting mapping would
    count to this rank's memory until it has the whole file.
    """

    def __init__(self, folder: Path, *, grown: tuple[int | None, int] | None = None) -> None:
        """List the folder's tensors.

        `grown`: the rows in the folder and in the model; the rows that are missing are the mean of
        those that are there. RecipeError or DataError when the folder has no weights, or one of its
        files cannot be opened.
        """
        self.folder = folder
        self._grown = grown
        self._means: dict[str, Tensor] = {}
        listing = self._listing()
        self._require_one_place(listing)
        self._files = {name: file for file, names in listing.items() for name in names}

    def fill(self, module: nn.Module, *, drawn: Callable[[ShardSpec], bool] = lambda spec: spec.added) -> None:
        """Set a block's own parameters, except those that are `drawn`. DataError, with its name,
        for a tensor that is missing, not finite or of another shape."""
        for _, parameter, spec in owned_specs(module):
            if drawn(spec):
                continue
            zero_padding(parameter.data, spec)
            for piece in spec.pieces:
                box = self.read(piece)
                piece.in_parameter(parameter.data).copy_(box.t() if piece.transposed else box)

    def holds(self, specs: Sequence[ShardSpec]) -> bool:
        """Return whether every logical tensor is here under its name."""
        return all(self._stored_name(piece.name) in self._files for spec in specs for piece in spec.pieces)

    def check_names(
        self, specs: Sequence[ShardSpec], *, ties: Mapping[str, Piece], is_unused: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Raise DataError for tensors in the folder that no parameter of the whole model takes.
        `specs` are unsharded.

        `ties`: further names of weights, under which a folder may have them again. `is_unused`:
        whether a name is known and not needed.
        """
        wanted = {self._stored_name(piece.name) for spec in specs for piece in spec.pieces}
        unwanted = self._files.keys() - wanted
        extra = sorted(name for name in unwanted - ties.keys() if not name.endswith(NOT_WEIGHTS) and not is_unused(name))
        if extra:
            others = f" (and {len(extra) - 1} more)" if extra[1:] else ""
            raise DataError(
                f"{self.folder}: tensor {extra[0]}{others} has no place in the model: "
                "config.json and the weights do not belong together"
            )
        for name in sorted(ties.keys() & unwanted):
            self._check_tie(name, ties[name])

    def _check_tie(self, name: str, weight: Piece) -> None:
        """Raise DataError where a folder has a tied weight again with other values: transformers
        would untie the two."""
        for first in range(0, weight.shape[0], COMPARED_ROWS):
            rows = min(COMPARED_ROWS, weight.shape[0] - first)
            box = replace(weight, start=(first, *weight.start[1:]), size=(rows, *weight.shape[1:]))
            if not torch.equal(self.read(replace(box, name=name)), self.read(box)):
                raise DataError(
                    f"{self.folder}: tensor {name} differs from {weight.name}, but config.json ties them: "
                    f"remove {name}, or set tie_word_embeddings to false in config.json where the family has that"
                )

    def _listing(self) -> dict[str, list[str]]:
        file = weights_file(self.folder)
        if file is not None and file.endswith(INDEX_SUFFIX):
            return self._indexed(self.folder / file)
        if file is not None:
            with self._open(file) as opened:
                return {file: list(opened.keys())}
        if (self.folder / "pytorch_model.bin").exists():
            raise RecipeError(
                f"{self.folder}: only pickled weights (pytorch_model.bin), which are never opened here: "
                "convert them with transformers' save_pretrained, which writes safetensors"
            )
        others = _names(sorted(path.name for path in self.folder.glob("*.safetensors")))
        there = f"; there is {others}, which transformers does not load either without being told" if others else ""
        raise RecipeError(f"{self.folder}: neither {SINGLE} nor {INDEX}{there}: give a Hugging Face folder with weights")

    def _require_one_place(self, listing: Mapping[str, list[str]]) -> None:
        """Check that every file can be opened, and that no tensor is in two of them, which would
        leave open which one is meant."""
        place: dict[str, str] = {}
        for file in listing:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - safetensors' files are no mappings
                    if place.setdefault(name, file) != file:
                        raise DataError(
                            f"{self.folder}: tensor {name} is in {place[name]} and in {file}: files of several models are "
                            "mixed here; fetch the folder again"
                        )

    def _indexed(self, index: Path) -> dict[str, list[str]]:
        listing: dict[str, list[str]] = {}
        for name, file in read_index(index).items():
            listing.setdefault(file, []).append(name)
        return listing

    def _open(self, file: str) -> Any:
        try:
            require_regular(self.folder / file)
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.folder / file}: cannot be read ({error}): fetch the folder again") from error

    def _stored_name(self, name: str) -> str:
        """Return the name in the folder. Checkpoints of a bare model (without its head) leave out
        the first part of the names, and some have older names."""
        names = [name, *(name.removesuffix(new) + old for new, old in LEGACY.items() if name.endswith(new))]
        bare = [of_whole.partition(".")[2] for of_whole in names]
        return next((stored for stored in (*names, *bare) if stored in self._files), name)

    def read(self, piece: Piece) -> Tensor:
        """Return one box of a logical tensor, as it is stored. DataError when it is missing, of
        another shape, or not finite in fp32, in which every run starts."""
        stored = self._stored_name(piece.name)
        if stored not in self._files:
            raise DataError(
                f"{self.folder}: tensor {piece.name} is missing: config.json and the weights do not belong together"
            )
        try:
            with self._open(self._files[stored]) as file:
                tensor = file.get_slice(stored)
                if tensor.get_dtype() not in FLOATS:
                    raise DataError(
                        f"{self.folder}: tensor {stored} is {tensor.get_dtype()}: quantized weights cannot be trained; "
                        f"give the original ones ({', '.join(FLOATS)})"
                    )
                shape = tuple(tensor.get_shape())
                dim = self._grown_dim(shape, piece.shape)
                if shape != piece.shape and dim is None:
                    raise DataError(
                        f"{self.folder}: tensor {stored} has shape {list(shape)}, the config asks for {list(piece.shape)}"
                    )
                ends = (min(at + n, of) for at, n, of in zip(piece.start, piece.size, shape, strict=True))
                box: Tensor = tensor[tuple(slice(min(at, end), end) for at, end in zip(piece.start, ends, strict=True))]
                if dim is not None and box.shape[dim] < piece.size[dim]:
                    box = self._with_means(stored, tensor, box, piece.size, dim)
        except SafetensorError as error:
            raise DataError(f"{self.folder}: tensor {stored} cannot be read ({error}): fetch the folder again") from error
        if not is_finite(box):
            raise DataError(f"{self.folder}: tensor {stored} holds NaN or infinity: fetch the folder again")
        if told := overflow(stored, box, torch.float32):
            raise DataError(f"{self.folder}: {told}: weights that large cannot be trained; give others")
        return box

    def _grown_dim(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
        """Return the only dimension in which the shapes differ, where they differ by the rows that
        were added; None: there is none."""
        if len(stored) != len(wanted):
            return None
        differing = [dim for dim, sizes in enumerate(zip(stored, wanted, strict=True)) if sizes[0] != sizes[1]]
        fits = len(differing) == 1 and (stored[differing[0]], wanted[differing[0]]) == self._grown
        return differing[0] if fits else None

    def _with_means(self, name: str, stored: Any, box: Tensor, size: tuple[int, ...], dim: int) -> Tensor:
        """Return the box, with what is missing along `dim` filled with the mean of the whole tensor
        along it.

        So a new row is no likelier than the others (Hewitt 2021,
        nlp.stanford.edu/~johnhew/vocab-expansion.html), and the same in every layout.
        """
        if name not in self._means:
            self._means[name] = _mean(stored, dim)
        mean = self._means[name]
        missing = list(size)
        missing[dim] -= box.shape[dim]
        wide = torch.promote_types(box.dtype, torch.float32)
        return torch.cat([box.to(wide), mean.to(wide).expand(missing)], dim)


def _mean(stored: Any, dim: int) -> Tensor:
    """Return the mean of a stored matrix along a dimension, which stays with size 1, float64. Only
    some rows are in memory at a time."""
    rows = stored.get_shape()[0]
    parts = (stored[first : first + COMPARED_ROWS].double() for first in range(0, rows, COMPARED_ROWS))
    if dim:
        return torch.cat([part.mean(dim, keepdim=True) for part in parts])
    mean: Tensor = torch.cat([part.sum(0, keepdim=True) for part in parts]).sum(0, keepdim=True) / rows
    return mean


def write_folder(
    tensors: Iterable[tuple[ShardSpec, Tensor]],
    folder: Path | None,
    *,
    dtype: torch.dtype,
    config: Mapping[str, Any],
    save_beside: Callable[[Path], None],
    through: Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]] = lambda tensors: tensors,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder completely or not at all.

    `folder` is None on ranks that only take part in the gathering. `save_beside` writes the
    tokenizer and the other files into the folder. `through` changes the logical tensors before they
    are rounded to `dtype`.

    Every logical tensor must be complete: an empty or partial one is an error, never a file.
    NotFinite or DataError, after all have been gathered, for one that has NaN or infinity, or would
    in `dtype`.
    """
    if folder is None:
        for _ in tensors:
            pass
        return
    with replacing_folder(folder) as draft:
        files = _write_tensors(through(assembled(tensors)), draft, dtype, shard_bytes)
        if len(files) > 1:
            write_index(files, draft / INDEX)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_beside(draft)


def file_name(number: int, files: int) -> str:
    """Return transformers' name for the number-th (from 0) of so many files of weights."""
    return SINGLE if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"


def write_index(files: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Write the index of {file: {tensor: bytes}}, where there is more than one file."""
    total = sum(size for names in files.values() for size in names.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    tensors: Iterable[NamedTensor], folder: Path, dtype: torch.dtype, shard_bytes: int
) -> dict[str, dict[str, int]]:
    """Save logical tensors in files of at most `shard_bytes` (or one tensor). Return {file:
    {tensor: bytes}}."""
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}
    rounding = Rounding(dtype)

    def flush() -> None:
        if pending:
            save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append({name: tensor.nbytes for name, tensor in pending.items()})
            pending.clear()

    for name, whole in tensors:
        tensor = rounding(name, whole)
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
    rounding.require_survivors()
    flush()
    files = {}
    for number, sizes in enumerate(shards):
        file = file_name(number, len(shards))
        (folder / f"{number}.part").rename(folder / file)
        files[file] = sizes
    return files


def assembled(tensors: Iterable[tuple[ShardSpec, Tensor]]) -> Iterator[NamedTensor]:
    """Join the pieces of each logical tensor on the CPU, and yield it when it is complete."""
    partial: dict[str, tuple[Tensor, int]] = {}
    for spec, parameter in tensors:
        for piece in spec.pieces:
            if parameter.numel() == 0:
                raise RuntimeError(f"{piece.name}: empty parameter; it was not gathered")
            if not math.prod(piece.size):  # a rank that has only padding of it
                continue
            logical, filled = partial.pop(piece.name, (torch.empty(piece.shape, dtype=parameter.dtype), 0))
            piece.box_of(logical).copy_(piece.in_parameter(parameter))
            filled += math.prod(piece.size)
            if filled == logical.numel():
                yield piece.name, logical
            else:
                partial[piece.name] = (logical, filled)
    if partial:
        raise RuntimeError(f"incomplete tensors: {', '.join(partial)}")
