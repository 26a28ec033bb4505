"""Master weights with exact first values, where DeepSpeed would start from rounded ones.

At stages 1 to 3 DeepSpeed copies its fp32 master weights from weights that are in bf16 or fp16 by
then (DeepSpeed 0.19.8, `_cast_module_mixed_precision`), and `zero.Init(module=...)` leaves weights
in the format they have. So a block is rounded here as soon as it is filled; each rank keeps its
share of the fp32 values, and writes it to the master weights when those exist. So every stage
starts from the values that stage 0 trains.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn

from parallel.collectives import all_gather
from parallel.mesh import Group
from parallel.params import ShardSpec, owned_specs
from trainer.errors import DataError
from trainer.model.finite import NAMES, WIDER, overflow


def require_in_range(parameter: Tensor, spec: ShardSpec, dtype: torch.dtype) -> None:
    """Raise DataError for first values that are infinite in the compute format."""
    if told := overflow(spec.pieces[0].name, parameter.detach(), dtype):
        raise DataError(f"{told}: set precision.dtype to {WIDER[NAMES[dtype]]}")


class MasterWeights:
    """An equal share of every parameter in fp32 on each rank, kept until `restore`.

    A share is stored where its master weight will be: on the parameter's device, in CPU memory or
    on NVMe. It is freed before Adam allocates its moments (8 bytes per element at the first step),
    so its 4 bytes per element raise no peak.
    """

    def __init__(self, group: Group, dtype: torch.dtype, deepspeed_config: dict[str, Any]) -> None:
        """Prepare the storage. `group`: the data-parallel ranks. At stage 0 and in fp32 nothing is
        stored, since the parameters are the master weights."""
        zero = deepspeed_config["zero_optimization"]
        offload = zero.get("offload_optimizer", {"device": "none"})
        self._group = group
        self._dtype = dtype
        self._stage = zero["stage"]
        self._needed = self._stage > 0 and dtype != torch.float32
        self._on_host = offload["device"] == "cpu"
        on_nvme = self._needed and offload["device"] == "nvme"
        self._file = tempfile.TemporaryFile(dir=offload["nvme_path"]) if on_nvme else None  # noqa: SIM115 - until restore
        self._shares: dict[nn.Parameter, Callable[[], Tensor]] = {}

    def rounding(self, fill: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        """Return a `fill` that leaves the block in the compute format, and stores the fp32 values
        of trained weights. At stage 0 it rounds only frozen weights, which the layers would
        otherwise round at every use."""

        def fill_and_round(block: nn.Module) -> None:
            fill(block)
            for _, parameter, spec in owned_specs(block):
                require_in_range(parameter, spec, self._dtype)
                if parameter.requires_grad and not self._needed:
                    continue
                if parameter.requires_grad:
                    self._shares[parameter] = self._keep(self._share_of(parameter.detach()))
                parameter.data = parameter.data.to(self._dtype)

        return fill_and_round

    def restore(self, optimizer: Any) -> None:
        """Write the values to the master weights of DeepSpeed's optimizer. At stages 1 and 2 all
        ranks of the group must call it together."""
        if not self._needed:
            return
        if self._stage == 3:
            self._write_shares(optimizer)
        else:
            for parameter in list(self._shares):
                # These stages divide the concatenated parameters, so only DeepSpeed knows each
                # rank's part.
                safe_set_full_fp32_param(parameter, self._gathered(parameter))
        if self._file is not None:
            self._file.close()

    def _share_of(self, values: Tensor) -> Tensor:
        """Return elements [rank · n, (rank + 1) · n) of the flattened values, n = ⌈size / ranks⌉,
        as ZeRO-3 divides them; zeros past the end."""
        size = -(-values.numel() // self._group.size)
        share = values.new_zeros(size)
        mine = values.reshape(-1)[self._group.rank * size :][:size]
        share[: mine.numel()] = mine
        return share

    def _keep(self, share: Tensor) -> Callable[[], Tensor]:
        """Store the share; return a function that reads it back."""
        if self._file is None:
            kept = share.cpu() if self._on_host else share
            return lambda: kept
        file, size = self._file, share.numel()
        start = file.seek(0, os.SEEK_END)
        share.cpu().numpy().tofile(file)

        def read() -> Tensor:
            file.seek(start)
            return torch.from_numpy(np.fromfile(file, dtype=np.float32, count=size))

        return read

    def _write_shares(self, optimizer: Any) -> None:
        """Write the shares at ZeRO-3, whose master weights are the same shares, many in one flat
        tensor.

        NVMe offload reads and writes that tensor once here. `safe_set_local_fp32_param` would do so
        for every parameter, 4 GB each way at the default sub_group_size.
        """
        for index, parameters in enumerate(optimizer.fp16_groups):
            swapped = optimizer._swappable_optimizer_subgroup(index)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_in(index)
            sizes = [parameter.partition_numel() for parameter in parameters]
            masters = optimizer.fp32_partitioned_groups_flat[index].detach().split(sizes)
            for parameter, master in zip(parameters, masters, strict=True):
                master.copy_(self._shares.pop(parameter)())
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(index)

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's whole fp32 values, on its device."""
        share = self._shares.pop(parameter)().to(parameter.device)
        return all_gather(share, self._group)[: parameter.numel()].view(parameter.shape)
