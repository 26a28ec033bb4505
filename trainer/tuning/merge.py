"""What was learned, put into the weights that it was learned for: a model like any other, without an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.model.hugging_face import NamedTensor
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.schema import Tuning
from trainer.tuning.adapt import scale_of
from trainer.tuning.targets import MERGEABLE, is_added, parts_of, targeted_modules, token_rows


def merged(tensors: Iterable[NamedTensor], *, tuning: Tuning, network: Network) -> Iterator[NamedTensor]:
    """The model's own tensors, the adapted ones with what was learned; each waits for its parts, which come with its layer.
    What no weight can take up is left out."""
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
    """For each tensor that changes, the names of the parts that change it: weights, the biases of what is rescaled, and
    matrices over the vocabulary that get the rows of new tokens."""
    vocabulary = {weight: [rows] for weight, rows in token_rows(tuning, network).items()}
    if tuning.method not in MERGEABLE:
        return vocabulary
    kinds = ("weight", "bias") if tuning.method == "ia3" else ("weight",)
    outputs_end = (names_of(network).attention_out, names_of(network).mlp_out)
    inputs_are_scaled = tuple(name.rpartition("}")[2] + ".bias" for name in outputs_end)
    names = {f"{module}.{kind}": parts_of(tuning, module) for module in targeted_modules(tuning, network) for kind in kinds}
    return vocabulary | {name: parts for name, parts in names.items() if not name.endswith(inputs_are_scaled)}


def merge(tensor: Tensor, parts: Sequence[Tensor], *, name: str, tuning: Tuning, network: TransformerConfig) -> Tensor:
    """Computed and left in fp32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    parts, tensor = [part.to(wide) for part in parts], tensor.to(wide)
    if name in token_rows(tuning, network):
        return tensor.index_copy(0, torch.tensor(network.new_tokens), parts[0])
    if name.endswith(".bias"):
        return tensor * parts[0].flatten()
    transposed = names_of(network).transposed
    weight_OI = tensor.t() if transposed else tensor
    weight_OI = _changed(weight_OI, parts, tuning)
    return weight_OI.t().contiguous() if transposed else weight_OI


def _changed(weight_OI: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    """W + s · B A, its rows stretched to their lengths where there are such (DoRA); W + s · B diag(E) A; or W · l."""
    if tuning.method == "ia3":
        return weight_OI * parts[0]
    a_RI, b_OR, *more = parts
    if tuning.method == "adalora":
        a_RI = a_RI * more[0]
    changed_OI = weight_OI + scale_of(tuning) * (b_OR @ a_RI)
    if tuning.method != "dora":
        return changed_OI
    lengths_O: Tensor = torch.linalg.vector_norm(changed_OI, dim=-1)
    return changed_OI * (more[0] / lengths_O).unsqueeze(-1)
