"""The collectives that this rank came to, from torch's flight recorder.

It keeps the last ones in memory, for gloo and NCCL, with number, group, shapes and whether they are
over. Messages between two pipeline stages are recorded for NCCL only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as bindings

DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # torch for CPUs has only the second
KEPT = 3  # collectives of each group
LEAST_CONTEXT = 3  # fewer preceding collectives do not tell which should come next


@dataclass(frozen=True)
class Collective:
    """The `number`-th collective of its group; the same on all its ranks, if all came to the same
    ones.

    `usual`: the collective that came at this point before, if it was another one. Steps repeat
    themselves, so one was left out, or is one too many.
    """

    group: str
    axes: str  # the purpose of the group: "dp", "tp" …
    ranks: tuple[int, ...]
    number: int
    operation: str
    shapes: str
    dtypes: str
    over: bool
    age_s: float
    usual: str = ""

    @property
    def what(self) -> str:
        return f"{self.operation} {self.shapes} {self.dtypes}"

    def __str__(self) -> str:
        members = ", ".join(map(str, self.ranks)) if len(self.ranks) <= 8 else f"{self.ranks[0]} … {self.ranks[-1]}"
        return f"{self.what}, {self.number} of {self.axes} (ranks {members})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Collective:
        return cls(**{**value, "ranks": tuple(value["ranks"])})


def collectives() -> list[Collective]:
    """Return the last collectives of each group, in the order in which this rank came to them."""
    now, members = time.time_ns(), _members()
    entries = list(_entries())
    found = [
        Collective(
            group=str(entry["process_group"][0]),
            axes=str(entry["process_group"][1]),
            ranks=members.get(str(entry["process_group"][0]), ()),
            number=int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]),
            operation=str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"]),
            shapes=" ".join(map(str, entry["input_sizes"])),
            dtypes=" ".join(dict.fromkeys(map(str, entry["input_dtypes"]))),
            over=bool(entry["retired"]) or entry["state"] == "completed",
            age_s=(now - int(entry["time_created_ns"])) / 1e9,
        )
        for entry in entries
    ]
    if not found:
        return []
    # A thread that saves in the background has collectives of its own in between.
    thread = entries[-1]["thread_id"]
    line = [f"{c.what} of {c.axes}" for c, entry in zip(found, entries, strict=True) if entry["thread_id"] == thread]
    found[-1] = replace(found[-1], usual=usual_instead(line))
    left = Counter(collective.group for collective in found)
    kept = []
    for collective in found:
        if left[collective.group] <= KEPT:
            kept.append(collective)
        left[collective.group] -= 1
    return kept


def usual_instead(line: Sequence[str]) -> str:
    """Return what usually follows the collectives before the last one, if it is another one than
    the last; else "".

    The longest match decides, because layers are alike, and only what came before them tells the
    last layer from the others.
    """
    if not line:
        return ""
    *history, last = line
    best, follower = LEAST_CONTEXT - 1, last
    for end in range(len(history) - 1, 0, -1):  # history[:end] is followed by history[end]
        length = 0
        while length < end and history[end - 1 - length] == history[-1 - length]:
            length += 1
        if length > best:
            best, follower = length, history[end]
    return "" if follower == last else follower


def _entries() -> Iterator[dict[str, Any]]:
    for name in DUMPS:
        if dump := getattr(bindings, name, None):
            yield from json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])


def _members() -> dict[str, tuple[int, ...]]:
    """Return the global ranks of each group, by its name."""
    world = dist.distributed_c10d._world
    return {name: tuple(sorted(world.pg_group_ranks.get(group, ()))) for group, name in world.pg_names.items()}
