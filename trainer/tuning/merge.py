"""Weights with their adapters merged: a model like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.model.hugging_face import NamedTensor
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.schema import Tuning
from trainer.tuning.builders import LayerBuilder, builder_of
from trainer.tuning.targets import is_added, parts_of, targeted_modules, token_rows


def merged(tensors: Iterable[NamedTensor], *, tuning: Tuning, network: Network) -> Iterator[NamedTensor]:
    """Yield the model's own tensors, the adapted ones with their adapters merged.

    Each of these waits for its parts, which come with its layer. Parts that cannot be merged into
    a weight are left out.
    """
    parts_by_name = merged_tensors(tuning, network) if isinstance(network, TransformerConfig) else {}
    wanted = {part for parts in parts_by_name.values() for part in parts}
    waiting: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in parts_by_name:
            waiting[name] = tensor
        elif name in wanted:
            parts[name] = tensor
        elif not is_added(name):
            yield name, tensor
        for ready in [each for each in waiting if parts.keys() >= set(parts_by_name[each])]:
            values = [parts[part] for part in parts_by_name[ready]]
            assert isinstance(network, TransformerConfig), "family auto has no tuning"
            yield ready, merge(waiting.pop(ready), values, name=ready, tuning=tuning, network=network)
    assert not waiting, f"never complete: {', '.join(waiting)}"


def merged_tensors(tuning: Tuning, network: TransformerConfig) -> dict[str, list[str]]:
    """Return, for each tensor that changes, the names of the parts that change it: weights,
    biases where the method changes them, and matrices over the vocabulary that get the rows of
    new tokens."""
    names = {weight: [rows] for weight, rows in token_rows(tuning, network).items()}
    for module in targeted_modules(tuning, network):
        layer = _layer(module, tuning, network)
        if layer.merged is not None:
            names[f"{module}.weight"] = parts_of(tuning, module)
        if layer.merged_bias is not None:
            names[f"{module}.bias"] = parts_of(tuning, module)
    return names


def merge(tensor: Tensor, parts: Sequence[Tensor], *, name: str, tuning: Tuning, network: TransformerConfig) -> Tensor:
    """Return one of the model's own tensors with its parts merged, in fp32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    parts, tensor = [part.to(wide) for part in parts], tensor.to(wide)
    if name in token_rows(tuning, network):
        return tensor.index_copy(0, torch.tensor(network.new_tokens), parts[0])
    module, _, kind = name.rpartition(".")
    layer = _layer(module, tuning, network)
    change = layer.merged_bias if kind == "bias" else layer.merged
    assert change is not None, f"{name} does not change"
    transposed = names_of(network).transposed and kind == "weight"
    changed = change(tensor.t() if transposed else tensor, parts, tuning)
    return changed.t().contiguous() if transposed else changed


def _layer(module: str, tuning: Tuning, network: TransformerConfig) -> LayerBuilder:
    """Return how the layer of a module that is adapted is tuned. The last projections of
    attention and MLP are row-parallel, the others column-parallel."""
    builder, names = builder_of(tuning), names_of(network)
    last = tuple(name.rpartition("}")[2] for name in (names.attention_out, names.mlp_out))
    layer = builder.row if module.endswith(last) else builder.column
    assert layer is not None, f"{tuning.method} has nothing beside {module}"
    return layer
