"""An adapter as a folder of its own: a file of the weights trained beside a model, and a file of
their configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.files.durable import replacing_folder
from trainer.model.config import TransformerConfig
from trainer.model.finite import Rounding
from trainer.model.hugging_face import NamedTensor
from trainer.model.network import Network
from trainer.schema import Recipe, Tuning
from trainer.tuning import bottleneck_format, peft_format
from trainer.tuning.builders import builder_of
from trainer.tuning.merge import merge
from trainer.tuning.methods import method_of
from trainer.tuning.targets import TOKEN_ROWS, is_added, token_rows


def leaves_adapter(recipe: Recipe) -> bool:
    """Return whether a run's export is an adapter.

    Without a pretrained folder it is not, because nobody else has the weights that it belongs to.
    """
    has_parts = bool(method_of(recipe.tuning).parts)
    return has_parts and not recipe.tuning.merge and recipe.model.from_pretrained is not None


@dataclass(frozen=True)
class AdapterFormat:
    """The file format of an adapter.

    `prefix`: the beginning of the names in the file of weights, before our logical names.
    `saved_whole`: for formats without rows of single tokens, our names of the embedding and the
    head with new tokens → the names under which the file has the whole matrix.
    """

    config_file: str
    weights_file: str
    prefix: str
    config: dict[str, Any]
    tuning: Tuning
    network: TransformerConfig
    saved_whole: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, recipe: Recipe, network: Network) -> AdapterFormat:
        """Return peft's format if peft has the method, else the format of bottleneck adapters."""
        assert isinstance(network, TransformerConfig), "family auto has no tuning"
        tuning = recipe.tuning
        if builder_of(tuning).in_peft is not None:
            config, saved_whole = peft_format.adapter_config(recipe, network), peft_format.saved_whole(tuning, network)
            return cls(peft_format.CONFIG, peft_format.WEIGHTS, peft_format.PREFIX, config, tuning, network, saved_whole)
        config = bottleneck_format.bottleneck_config(recipe, network)
        return cls(bottleneck_format.CONFIG, bottleneck_format.WEIGHTS, "", config, tuning, network, {})

    def wanted(self, name: str) -> bool:
        """Return whether the file needs this logical tensor."""
        return is_added(name) or name in self.saved_whole

    def write(self, tensors: Iterable[NamedTensor], folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
        """Write both files, of those tensors that were trained beside the model. Return the tensors
        that were written.

        NotFinite or DataError, after all have been read, for one that has NaN or infinity, or would
        in `dtype`.
        """
        rounding = Rounding(dtype)
        found = {name: rounding(name, tensor).contiguous() for name, tensor in self._contents(tensors)}
        rounding.require_survivors()
        in_peft, more = builder_of(self.tuning).in_peft, dict[str, Any]()
        if in_peft is not None:
            found, more = in_peft.trimmed(found)
        written = {self.prefix + name: tensor for name, tensor in found.items()}
        save_file(written, folder / self.weights_file, metadata={"format": "pt"})
        text = json.dumps({**self.config, **more}, indent=2) + "\n"
        (folder / self.config_file).write_text(text, encoding="utf-8")
        return written

    def _contents(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Yield the tensors of the file, by their names there."""
        rows: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if name in self.saved_whole:
                whole[name] = tensor
            elif self.saved_whole and name.endswith(TOKEN_ROWS):
                rows[name] = tensor
            elif is_added(name):
                yield name, tensor
        rows_of = token_rows(self.tuning, self.network)
        for name, tensor in whole.items():
            parts = [rows[rows_of[name]]] if name in rows_of else []
            complete = merge(tensor, parts, name=name, tuning=self.tuning, network=self.network) if parts else tensor
            for stored in self.saved_whole[name]:
                yield stored, complete.clone()  # safetensors refuses two names for the same memory


def write_adapter(
    tensors: Iterable[NamedTensor],
    folder: Path | None,
    *,
    dtype: torch.dtype,
    form: AdapterFormat,
    save_beside: Callable[[Path], None],
) -> None:
    """Write the adapter folder completely or not at all; `folder` is None on ranks that only take
    part in the gathering."""
    if folder is None:
        for _ in tensors:
            pass
        return
    with replacing_folder(folder) as draft:
        form.write(tensors, draft, dtype)
        save_beside(draft)
