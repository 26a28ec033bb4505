"""The parameters of a model that is spread over ranks, collected one by one on the first rank, and
the logical tensors they are pieces of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group
from parallel.params import Init, Role, ShardSpec
from parallel.pieces import Piece


def gather_to_first(
    parameters: Iterable[tuple[ShardSpec, Tensor]], group: Group, device: torch.device
) -> Iterator[tuple[ShardSpec, Tensor]]:
    """Yield, on the group's first rank, every parameter that a rank of the group owns, one of each
    rank per round; on the others nothing.

    The ranks of a tensor group list their parameters in the same order, so a logical tensor is
    complete after one round, and the first rank never holds more than one round. Every rank of the
    group must iterate to the end. Messages travel on `device`: for each parameter a JSON text
    (null: this rank has no more; empty: it owns nothing in this round), then the tensor.
    """
    if group.rank == 0:
        yield from _collect(parameters, group, device)
        return
    for spec, tensor in parameters:
        _send_text(_header(spec, tensor) if spec.owned else {}, group, device)
        if spec.owned:
            dist.send(tensor.to(device).contiguous(), group.ranks[0], group=group.handle)
    _send_text(None, group, device)


def logical_tensors(parameters: Iterable[tuple[ShardSpec, Tensor]]) -> dict[str, Tensor]:
    """Return whole tensors by name, on the CPU, put together from the pieces received. Elements
    that no piece covers are NaN."""
    tensors: dict[str, Tensor] = {}
    for spec, parameter in parameters:
        for piece in spec.pieces:
            whole = tensors.setdefault(piece.name, torch.full(piece.shape, math.nan, dtype=parameter.dtype))
            piece.box_of(whole).copy_(piece.in_parameter(parameter))
    return tensors


def _collect(
    parameters: Iterable[tuple[ShardSpec, Tensor]], group: Group, device: torch.device
) -> Iterator[tuple[ShardSpec, Tensor]]:
    own = iter(parameters)
    others = list(group.ranks[1:])
    mine = next(own, None)
    while mine is not None or others:
        if mine is not None:
            yield mine
            mine = next(own, None)
        for source in list(others):
            header = _receive_text(source, group, device)
            if header is None:
                others.remove(source)
            elif header:
                yield _receive_parameter(header, source, group, device)


def _header(spec: ShardSpec, tensor: Tensor) -> dict[str, Any]:
    return {
        "role": spec.role,
        "init": asdict(spec.init),
        "pieces": [asdict(piece) for piece in spec.pieces],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "added": spec.added,
    }


def _receive_parameter(header: dict[str, Any], source: int, group: Group, device: torch.device) -> tuple[ShardSpec, Tensor]:
    pieces = tuple(map(_piece, header["pieces"]))
    tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]), device=device)
    dist.recv(tensor, source, group=group.handle)
    spec = ShardSpec(Role(header["role"]), Init(**header["init"]), pieces, copies=Group.alone(), added=header["added"])
    return spec, tensor


def _piece(fields: dict[str, Any]) -> Piece:
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Piece(**{**fields, **lists})


def _send_text(header: dict[str, Any] | None, group: Group, device: torch.device) -> None:
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8).to(device)
    for message in (torch.tensor([text.numel()], device=device), text):
        dist.send(message, group.ranks[0], group=group.handle)


def _receive_text(source: int, group: Group, device: torch.device) -> dict[str, Any] | None:
    length = torch.empty(1, dtype=torch.int64, device=device)
    dist.recv(length, source, group=group.handle)
    text = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.recv(text, source, group=group.handle)
    header: dict[str, Any] | None = json.loads(bytes(text.cpu().tolist()))
    return header
