"""The start of DeepSpeed: the ranks it is told about, and the choices made before it makes its
own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # else DeepSpeed looks for the compilers of other accelerators
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from torch import nn

from parallel.mesh import Group, Mesh
from trainer.engine.bucket import KEY, bucket_size
from trainer.engine.freed_memory import keep_freed_memory
from trainer.engine.threaded_io import use_threads_where_async_io_is_missing
from trainer.engine.zero_on_cpu import move_directly, one_by_one, reduce_in_place, reduce_to_owners, scatter_directly
from trainer.errors import RecipeError
from trainer.schema import LARGEST, Precision, Recipe

logger = logging.getLogger(__name__)


def start(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], units: Units, *, groups_are_tiles: bool = False
) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and its optimizer, which wrap ours.

    `groups_are_tiles`: the parameter groups are cut to size already, and DeepSpeed must cut no
    further.
    """
    config = _with_full_buckets(config, optimizer)
    if groups_are_tiles:
        config = {**config, "zero_optimization": {**config["zero_optimization"], "sub_group_size": LARGEST}}
    # DeepSpeed prints memory reports at ZeRO-1 in bf16, asked or not
    with contextlib.redirect_stdout(_LogLines()):
        engine, wrapped, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=units, dist_init_required=False
        )
    # that of stage 2, and of stage 1 but in bf16
    divides_gradients = hasattr(wrapped, "allreduce_and_scatter")
    if divides_gradients and not wrapped.cpu_offload:
        # In half formats DeepSpeed adds reduced gradients to the flat partition that the update
        # reads. In fp32 it copies them three times before.
        wrapped._use_compact_grad_partition_buffer = lambda group_idx: True
    if get_accelerator().device_name() == "cpu":
        reduce_in_place(engine)
        if divides_gradients:
            reduce_to_owners(wrapped)
    return engine, wrapped


def _with_full_buckets(config: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the dict with a gradient bucket no larger than all gradients together.

    Gradients are reduced at the same moments as with the larger bucket. DeepSpeed allocates a whole
    bucket, at stages 1 and 2 anew in each backward, and torch fills it where kernels are
    deterministic. That takes most of the time of a small model's step, and with a bucket of 2⁴⁰
    elements more memory than there is.
    """
    sizes = [getattr(p, "ds_numel", p.numel()) for group in optimizer.param_groups for p in group["params"]]
    zero, on_cpu = config["zero_optimization"], get_accelerator().device_name() == "cpu"
    fitting = {**zero, KEY: bucket_size(zero[KEY], sum(sizes), on_cpu=on_cpu)}
    return {**config, "zero_optimization": fitting}


SWAPPED_BYTES = 2**20  # a smaller share of a weight stays in memory


def require_swap_buffers(recipe: Recipe, parameters: Sequence[Any]) -> None:
    """Raise RecipeError where weights on NVMe have fewer buffers than may be in memory at once.

    A weight keeps its buffer while it is live, and DeepSpeed stops in the middle of a forward when
    no buffer is left.
    """
    zero, keys = recipe.zero, recipe.zero.offload_param
    if keys.device != "nvme" or sum(p.partition_numel() for p in parameters) <= keys.max_in_cpu:
        return
    least = max(SWAPPED_BYTES, recipe.deepspeed.aio.block_size)
    swapped = [int(p.ds_numel) for p in parameters if not p.ds_persist and p.partition_numel() * p.element_size() >= least]
    # What backward needs soon is kept, whatever the number of live elements.
    limit = max(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance) + zero.stage3_prefetch_bucket_size
    at_once = _most_live(swapped, limit)
    if keys.buffer_count < at_once:
        raise RecipeError(
            f"zero.offload_param.buffer_count = {keys.buffer_count}, but {at_once} weights may be in memory at once, each in a "
            f"buffer (zero.stage3_max_live_parameters {zero.stage3_max_live_parameters}, stage3_max_reuse_distance "
            f"{zero.stage3_max_reuse_distance}, stage3_prefetch_bucket_size {zero.stage3_prefetch_bucket_size}): legal: "
            f"{at_once} or more, or lower those three"
        )


def _most_live(sizes: Sequence[int], limit: int) -> int:
    """Return the largest number of weights that are in memory at once.

    They are consecutive weights with at most `limit` elements together, the next one, which is
    being fetched, and the one before, which is released after that.
    """
    most = first = held = 0
    for last, size in enumerate(sizes):
        held += size
        while held > limit:
            held -= sizes[first]
            first += 1
        most = max(most, last + 1 - first)
    return min(len(sizes), most + 2)


def whole(parameters: Sequence[nn.Parameter], *, zero_stage: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the parameters are whole.

    At stage 3 it gathers them from the data-parallel ranks, which must all enter it.
    """
    return deepspeed.zero.GatheredParameters(list(parameters)) if zero_stage == 3 else contextlib.nullcontext()


class _LogLines(io.TextIOBase):
    """A stdout whose lines go to this rank's log."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logger.info(line.rstrip())
        return len(text)


class Units:
    """The process groups of the mesh under the names that DeepSpeed asks for (its `mpu`).

    Its "model parallel" ranks are those that have one copy of the model together: gradient norms
    are summed over them, and the first of them counts all of its parameters, marked or not. The
    tensor group is not given separately: DeepSpeed would then take the first tensor rank of every
    pipeline stage for that first rank.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._groups: dict[str, Group] = {"data_parallel": mesh.reduction, "model_parallel": mesh.replica}

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


def prepare(recipe: Recipe, dtype: torch.dtype, notes: list[str]) -> None:
    """Settle before `initialize` what DeepSpeed would decide by itself; add remarks to `notes`."""
    if not deepspeed.comm.is_initialized():
        # Its shared-memory collectives serve inference only; without this line they are compiled at
        # the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        keep_freed_memory(os.environ)
        move_directly(deepspeed.comm.comm.cdb)
        scatter_directly(stage3)
        # These ranges are for a GPU's profiler; at ZeRO-3 a step had 2,000 of them.
        deepspeed.utils.nvtx.enable_nvtx = False
    if dtype == torch.float16 and accelerator.device_name() == "cpu":
        # The CPU accelerator denies fp16 without AVX512-FP16; torch computes it all the same,
        # slower.
        accelerator.is_fp16_supported = lambda: True
    if dtype == torch.float64:
        reducible = accelerator.supported_dtypes()  # lacks float64, which the backends do reduce
        accelerator.supported_dtypes = lambda: [*reducible, torch.float64]
    if "nvme" in (recipe.zero.offload_optimizer.device, recipe.zero.offload_param.device):
        remark = use_threads_where_async_io_is_missing()
        notes += [remark] if remark else []
    if recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)
    notes += set_matmul_format(recipe.precision)


def set_matmul_format(precision: Precision) -> list[str]:
    """Set the format in which this process multiplies fp32 matrices on GPUs; return a remark where
    the device does not have it. NVIDIA's have TF32 from Ampere on."""
    tf32 = precision.matmul == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    if not tf32 or (torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0)):
        return []
    return ["precision.matmul tf32: the devices here have no TF32; fp32 products stay exact"]


def reading_once(swap_in: Callable[..., None]) -> Callable[..., None]:
    """Return a `swap_in` that reads a weight once where it is named twice.

    DeepSpeed's prefetch names the weights of the next operations, the last of a forward and the
    first of its backward among them, and asserts that none has a buffer already.
    """

    def once(params: Sequence[nn.Parameter], *rest: Any, **named: Any) -> None:
        swap_in(list(dict.fromkeys(params)), *rest, **named)

    return once


def partitioning(deepspeed_config: dict[str, Any], units: Units) -> Callable[[nn.Module], None]:
    """Return a function that divides a block's weights over the data-parallel ranks (ZeRO-3).

    It is called as soon as the block is built.
    """
    swapper: list[Any] = []
    config = one_by_one(deepspeed_config) if get_accelerator().device_name() == "cpu" else deepspeed_config

    def partition(block: nn.Module) -> None:
        init = deepspeed.zero.Init(
            module=block,
            data_parallel_group=units.get_data_parallel_group(),
            config_dict_or_path=config,
            param_swapper=swapper[0] if swapper else None,
            mpu=units,
        )
        if init.param_swapper is not None and not swapper:
            init.param_swapper.swap_in = reading_once(init.param_swapper.swap_in)
            swapper.append(init.param_swapper)

    return partition
