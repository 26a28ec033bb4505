"""The mesh in the words that DeepSpeed asks for (its `mpu`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallel.mesh import Group, Mesh


class Units:
    """What DeepSpeed calls "model parallel" and "data parallel".

    Its "model parallel" ranks are those that hold one copy of the model together: gradient norms are summed over them, and
    their first counts all of its parameters, marked or not. The tensor group is not told apart: DeepSpeed would then take
    the first tensor rank of every pipeline stage for that first one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._groups: dict[str, Group] = {"data_parallel": mesh.dp, "model_parallel": mesh.replica}

    def __getattr__(self, name: str) -> Callable[[], Any]:
        for prefix, group in self._groups.items():
            answers = {
                f"get_{prefix}_group": group.handle,
                f"get_{prefix}_rank": group.rank,
                f"get_{prefix}_world_size": group.size,
            }
            if name in answers:
                return lambda: answers[name]
        raise AttributeError(name)
