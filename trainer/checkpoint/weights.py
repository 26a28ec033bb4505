"""The weights in a checkpoint, those of the model or of what was trained beside it, tensor by
tensor or into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.params import owned_specs, zero_padding
from parallel.pieces import Fragment
from parallel.quantized import CODES_PER_BYTE, dequantize
from trainer.checkpoint.folder import HUGGING_FACE
from trainer.checkpoint.manifest import LogicalTensor, Manifest
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.tensor_file import Slot
from trainer.data.tokenizer_loading import reopen_tokenizer
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import read_config
from trainer.model.names import names_of
from trainer.recipe.earlier import recipe_of
from trainer.schema import Recipe
from trainer.tuning.adapter_folder import AdapterFormat
from trainer.tuning.merge import merge as merged_weight
from trainer.tuning.merge import merged_tensors
from trainer.tuning.methods import method_of
from trainer.tuning.targets import is_added
from trainer.update_rules import WEIGHT

FORMATS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
# Other formats, such as those of counters in buffers, are kept.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Tuned:
    """The recipe and the network of a checkpoint with more than the model's own weights: an
    adapter, or the rows of new tokens."""

    recipe: Recipe
    network: TransformerConfig

    @classmethod
    def of(cls, checkpoint: Path, manifest: Manifest) -> Tuned | None:
        """Return them, or None if only the model's own weights were trained, all of them or the
        biases."""
        if not any(is_added(name) for name in manifest.tensors):
            return None
        recipe, folder = recipe_of(checkpoint, manifest.recipe), checkpoint / HUGGING_FACE
        network = from_hf(str(recipe.model.family), read_config(folder))
        if tokens := recipe.data.new_tokens:
            network = replace(network, new_tokens=tuple(sorted(reopen_tokenizer(folder).ids_of(tokens).values())))
        return cls(recipe, network)

    @property
    def has_adapter(self) -> bool:
        return bool(method_of(self.recipe.tuning).parts)

    @property
    def merges(self) -> bool:
        """Return whether weights can take up what was learned."""
        return method_of(self.recipe.tuning).merges

    @property
    def transposed(self) -> bool:
        """Return whether the family's files have weights [in, out]."""
        return names_of(self.network).transposed

    @property
    def form(self) -> AdapterFormat:
        return AdapterFormat.of(self.recipe, self.network)


class Contents:
    """The logical tensors to export: all of a checkpoint, or, if it has an adapter, those of the
    adapter or of the model."""

    def __init__(self, checkpoint: Path, manifest: Manifest, tuned: Tuned | None, *, adapter: bool) -> None:
        self._reader, self._tuned = Reader(checkpoint, manifest), tuned
        self._parts = merged_tensors(tuned.recipe.tuning, tuned.network) if tuned is not None and not adapter else {}
        beside = tuned.form.wanted if tuned is not None and adapter else lambda name: not is_added(name)
        self.tensors = {name: tensor for name, tensor in manifest.tensors.items() if WEIGHT in tensor.dtypes and beside(name)}
        if tuned is not None and not adapter:
            self.tensors |= dict(_quantized(manifest, tuned))

    def slots(self, dtype: str) -> dict[str, Slot]:
        return {
            name: Slot(FORMATS[dtype] if stored.dtypes[WEIGHT] in FLOATS else stored.dtypes[WEIGHT], stored.shape)
            for name, stored in self.tensors.items()
        }

    def whole(self, name: str) -> Tensor:
        weight = self.unmerged(name)
        if self._tuned is None or name not in self._parts:
            return weight
        parts = [self._reader.whole(part, WEIGHT) for part in self._parts[name]]
        return merged_weight(weight, parts, name=name, tuning=self._tuned.recipe.tuning, network=self._tuned.network)

    def unmerged(self, name: str) -> Tensor:
        """Return the model's own weight, dequantized if it was saved in few bits."""
        if not self.is_quantized(name):
            return self._reader.whole(name, WEIGHT)
        assert self._tuned is not None
        codes, magnitudes = (self._reader.whole(f"{name}:{state}", state) for state in ("codes", "magnitudes"))
        weight_OI = dequantize(codes, magnitudes, str(self._tuned.recipe.tuning.quantize))
        return weight_OI.t().contiguous() if self._tuned.transposed else weight_OI

    def is_quantized(self, name: str) -> bool:
        return name in self.tensors and not self.tensors[name].runs


def _quantized(manifest: Manifest, tuned: Tuned) -> Iterator[tuple[str, LogicalTensor]]:
    """Yield the weights that a checkpoint holds in few bits, as they will be exported, without
    fragments, which hold other values."""
    per_byte = CODES_PER_BYTE.get(str(tuned.recipe.tuning.quantize), 1)
    for name, stored in manifest.tensors.items():
        weight, _, state = name.partition(":")
        if state == "codes":
            shape = (stored.shape[0], stored.shape[1] * per_byte)
            yield weight, LogicalTensor(shape[::-1] if tuned.transposed else shape, {WEIGHT: "F32"}, ())


class Filling:
    """A filler that gives a block of the training network a checkpoint's weights, dequantized, with
    the adapter beside them.

    `through`: the format to which they are rounded on the way.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest, *, through: torch.dtype = torch.float32) -> None:
        self._reader, self._through = Reader(checkpoint, manifest), through
        self._model = Contents(checkpoint, manifest, Tuned.of(checkpoint, manifest), adapter=False)

    def __call__(self, block: nn.Module) -> None:
        for _, parameter, spec in owned_specs(block):
            zero_padding(parameter.data, spec)
            for piece in spec.pieces:
                target = piece.in_parameter(parameter.data)
                if self._model.is_quantized(piece.name):
                    target.copy_(piece.box_of(self._model.unmerged(piece.name)))
                    continue
                values = self._reader.read(Fragment.whole(piece), WEIGHT).to(self._through)
                target.copy_(values.view(target.shape))
