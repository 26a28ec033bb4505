"""The bytes that a rank's engine really holds, by kind: what the planner's figures are compared with.

Storages are counted once, whatever views of them there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from trainer.engine.engine import Engine


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from tensors_in(list(held.values()))
    elif isinstance(held, list | tuple | set):
        for part in held:
            yield from tensors_in(part)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the address → bytes of each storage that is not empty."""
    found = (tensor.untyped_storage() for tensor in tensors_in(list(tensors)))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held_by(engine: Engine) -> dict[str, int]:
    """Return the bytes of weights, master weights, optimizer states and gradients at this moment."""
    zero, inner = engine.optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer)
    parameters = [parameter for parameter, _ in engine.specs]
    buckets = storages(_of(zero, "bucket.buffer"))
    weights = storages(
        [
            *(p.data for p in parameters),
            *(getattr(p, "ds_tensor", None) for p in parameters),
            *_of(zero, "bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer", "param_groups_fp16_flat_cpu_memory"),
            *(part for weight in engine.quantized for _, part in weight.stored.values()),
        ]
    )
    masters = storages(
        _of(zero, "single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    )
    moments = storages([inner.state[p] for p in inner.state])
    flat = _of(zero, "single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    gradients = storages(
        [
            *(p.grad for p in parameters),
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(tensor.grad for tensor in tensors_in(flat)),
            *_of(
                zero,
                "averaged_gradients",
                "all_grad_tensors",
                "grads_in_partition",
                "fp32_groups_gradients_flat",
                "grad_partitions_flat_buffer",
                "accumulated_grads_in_cpu",
            ),
        ]
    )
    return {
        "weights": sum(weights.values()),
        "masters": sum(size for at, size in masters.items() if at not in weights),
        "states": sum(moments.values()),
        "gradients": sum(size for at, size in gradients.items() if at not in buckets),
        "buckets": sum(buckets.values()),
        "copies": sum(
            storages(
                _of(
                    zero,
                    "param_buffer_of_bit16_for_cpu_offload_groups",
                    "temp_grad_buffer_for_cpu_offload",
                    "temp_grad_buffer_for_gpu_offload",
                )
            ).values()
        ),
    }


def _of(zero: Any, *names: str) -> list[Any]:
    held = []
    for name in names:
        if name == "bucket.buffer":
            held += [bucket.buffer for bucket in vars(zero).get("ipg_buckets", {}).values()]
        else:
            held.append(vars(zero).get(name))
    return held
