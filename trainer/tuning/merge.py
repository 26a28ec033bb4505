"""What was learned, added to the weights that it was learned for: a model like any other, without an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.model.hugging_face import NamedTensor
from trainer.model.names import WEIGHT_NAMES
from trainer.model.network import Network
from trainer.sections import Tuning
from trainer.tuning.adapt import scale_of
from trainer.tuning.targets import parts_of, targeted_modules


def merged(tensors: Iterable[NamedTensor], *, tuning: Tuning, network: Network) -> Iterator[NamedTensor]:
    """The model's own tensors, the adapted ones with what was learned; each waits for its parts, which come with its layer."""
    if tuning.method is None or not isinstance(network, TransformerConfig):
        yield from tensors
        return
    of_weight = parts_by_weight(tuning, network)
    weight_of = {part: weight for weight, parts in of_weight.items() for part in parts}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        weight = weight_of.get(name, name)
        if weight not in of_weight:
            yield name, tensor
            continue
        seen = waiting.setdefault(weight, {})
        seen[name] = tensor
        if len(seen) == 1 + len(of_weight[weight]):
            del waiting[weight]
            yield weight, merge(seen[weight], [seen[part] for part in of_weight[weight]], tuning=tuning, network=network)
    assert not waiting, f"never complete: {', '.join(waiting)}"


def parts_by_weight(tuning: Tuning, network: TransformerConfig) -> dict[str, list[str]]:
    """For each adapted weight the names of what is beside it."""
    return {f"{module}.weight": parts_of(module) for module in targeted_modules(tuning, network)}


def merge(weight: Tensor, parts: list[Tensor], *, tuning: Tuning, network: TransformerConfig) -> Tensor:
    """W + s · B A, computed and left in fp32 at least; where the checkpoint stores [in, out], its transpose."""
    a_RI, b_OR = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
    change_OI = scale_of(tuning) * (b_OR @ a_RI)
    return weight.to(change_OI.dtype) + (change_OI.t() if WEIGHT_NAMES[network.family].transposed else change_OI)
