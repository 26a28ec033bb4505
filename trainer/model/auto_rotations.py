"""Rotary positions for each document of a transformers model whose frequencies depend on the length
of the text.

LongRoPE has one set of frequencies for texts up to the length of its first training, and one for
longer ones. Dynamic NTK scaling has other frequencies for every length beyond that. transformers
chooses them by the longest row of a call, and dynamic scaling also by earlier calls, so a document
would be rotated differently beside a longer one. Here each row is rotated as if it were alone.

Shape letters: R rows, L longest of them, D rotated features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ORIGINAL = "original_max_position_embeddings"


class DocumentRotations:
    """The rotations of all such modules in a model. `of` sets the lengths of the rows of a call."""

    def __init__(self, model: nn.Module) -> None:
        self._lengths: Sequence[int] = ()
        for module in model.modules():
            if _depends_on_length(module):
                rotation = _Rotation(module)
                module.forward = partial(self._rotated, rotation)

    @contextmanager
    def of(self, lengths: Sequence[int]) -> Iterator[None]:
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = ()

    def _rotated(self, rotation: _Rotation, x: Any, position_ids: Tensor, *args: Any, **named: Any) -> Any:
        groups: dict[Hashable, list[int]] = {}
        for row, length in enumerate(self._lengths):
            groups.setdefault(rotation.kind_of(length), []).append(row)
        if len(groups) < 2 or position_ids.dim() != 2:
            return rotation(x, position_ids, *args, **named)
        whole: Any = None
        for rows in groups.values():
            longest = max(self._lengths[row] for row in rows)
            ids = position_ids[:, :longest] if position_ids.shape[0] == 1 else position_ids[rows, :longest]
            part = rotation(x, ids, *args, **named)
            several = part if isinstance(part, tuple) else (part,)
            if whole is None:
                shape = (len(self._lengths), position_ids.shape[1])
                whole = tuple(one.new_zeros(*shape, *one.shape[2:]) for one in several)
            for target, one in zip(whole, several, strict=True):
                target[rows, :longest] = one
        return whole if isinstance(part, tuple) else whole[0]


class _Rotation:
    """The rotation of one module, without memory of the texts of earlier calls."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._fresh: tuple[dict[str, Tensor | None], dict[str, Any]] | None = None
        parameters = getattr(module.config, "rope_parameters", None)
        self._limits = sorted({*_limits(parameters or {}), int(module.original_max_seq_len)})
        self._by_length = any("dynamic" in kind for kind in _kinds(module))

    def kind_of(self, length: int) -> Hashable:
        """Return a key that is equal for texts with the same frequencies."""
        if self._by_length and length > self._limits[0]:
            return length
        return tuple(length > limit for limit in self._limits)

    @torch.no_grad()
    def __call__(self, *args: Any, **named: Any) -> Any:
        own = vars(self._module)
        if self._fresh is None:
            numbers = {key: value for key, value in own.items() if isinstance(value, int | float)}
            self._fresh = dict(self._module._buffers), numbers
        buffers, numbers = self._fresh
        self._module._buffers.update(buffers)
        own.update({key: value for key, value in numbers.items() if key != "training"})
        return self._forward(*args, **named)


def _depends_on_length(module: nn.Module) -> bool:
    return hasattr(module, "original_max_seq_len") and any("dynamic" in kind or kind == "longrope" for kind in _kinds(module))


def _kinds(module: nn.Module) -> list[str]:
    """Return the kind of rotation of all layers or, where layers differ, the kinds."""
    kinds = getattr(module, "rope_type", None)
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, Mapping) else [kinds])]


def _limits(parameters: Any) -> Iterator[int]:
    """Yield the lengths up to which the frequencies are those of the first training, wherever
    rope_parameters names them."""
    if isinstance(parameters, Mapping):
        if isinstance(limit := parameters.get(ORIGINAL), int | float):
            yield int(limit)
        for inner in parameters.values():
            yield from _limits(inner)
