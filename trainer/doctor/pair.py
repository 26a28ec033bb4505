"""The program of two processes that measure what ranks of a node do to each other: collectives
between them, and each one's own speed while the other works too.

    python -m trainer.doctor.pair RANK PORT

Rank 0 prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.doctor.rank_speed import rank_speed
from trainer.doctor.speed import lower_quartile, timed_s
from trainer.schema import Dtype

RANKS = 2
SIZES = tuple(1 << n for n in (2, 12, 16, 20, 23, 26))
FORMATS: tuple[Dtype, ...] = ("fp32", "bf16")
TIMEOUT = timedelta(seconds=60)
BUDGET_S = 0.2


def main(words: Sequence[str]) -> int:
    rank, port = int(words[0]), int(words[1])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what libraries print
        figures = _measured(rank, port)
        if rank == 0:
            answer.write(json.dumps(figures))
    return 0


def _measured(rank: int, port: int) -> dict[str, Any]:
    on_gpus = torch.cuda.device_count() >= RANKS
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    try:
        return {
            "ranks": RANKS,
            "backend": backend,
            "threads": torch.get_num_threads(),
            "collectives": [_collective(kind, size, device) for kind in KINDS for size in SIZES],
            **({} if on_gpus else rank_speed(RANKS, FORMATS, dist.barrier)),
        }
    finally:
        dist.destroy_process_group()


def _collective(kind: str, size: int, device: torch.device) -> dict[str, Any]:
    action = KINDS[kind](torch.zeros(size // 4, device=device))
    dist.barrier()
    # Both ranks must repeat equally often: the first one tells how often.
    action()
    once = torch.tensor([timed_s(action, device)])
    repeats = (BUDGET_S / once).clamp(4, 400).to(torch.int64).to(device)
    dist.broadcast(repeats, 0)
    times = [timed_s(action, device) for _ in range(int(repeats))]
    return {"kind": kind, "bytes": size, "seconds": lower_quartile(times)}


def _all_reduce(tensor: torch.Tensor) -> Callable[[], object]:
    return lambda: dist.all_reduce(tensor)


def _all_gather(tensor: torch.Tensor) -> Callable[[], object]:
    """Return an all-gather of which the tensor is the whole outcome."""
    own = tensor[: max(1, tensor.numel() // RANKS)].clone()
    whole = torch.empty(RANKS * own.numel(), device=tensor.device)
    return lambda: dist.all_gather_into_tensor(whole, own)


def _reduce_scatter(tensor: torch.Tensor) -> Callable[[], object]:
    """Return a reduce-scatter of the whole tensor."""
    whole = tensor[: tensor.numel() // RANKS * RANKS] if tensor.numel() >= RANKS else tensor.repeat(RANKS)
    own = torch.empty(whole.numel() // RANKS, device=tensor.device)
    return lambda: dist.reduce_scatter_tensor(own, whole)


def _send(tensor: torch.Tensor) -> Callable[[], object]:
    """Return a message there and one back, of half the tensor each."""
    half = tensor[: max(1, tensor.numel() // 2)].clone()

    def there_and_back() -> None:
        first = dist.get_rank() == 0
        (dist.send if first else dist.recv)(half, 1 if first else 0)
        (dist.recv if first else dist.send)(half, 1 if first else 0)

    return there_and_back


KINDS: dict[str, Callable[[torch.Tensor], Callable[[], object]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "send_and_back": _send,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
