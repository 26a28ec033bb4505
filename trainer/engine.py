"""The one adapter of DeepSpeed: a stage of the model in, steps out.

Plain `deepspeed.initialize` at every ZeRO stage. What is DeepSpeed's here: dividing optimizer state, gradients and
weights, offload, reduction, the fp32 master weights at stages 1 to 3. What is ours: their first values, the normalisation
constant, the loss scale, the learning rate, and at stage 0 (where DeepSpeed has no fp32 accumulation for half precision)
norm, clipping and skipping.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for the compilers of other accelerators
import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from parallel.attention import Documents
from parallel.collectives import all_reduce
from parallel.mesh import Group, Mesh
from parallel.params import ShardSpec, derive_seed, owned_specs
from trainer.batching import BatchPlan
from trainer.data.loader import MicroBatch
from trainer.errors import DataError
from trainer.loss_scale import LossScaler
from trainer.master_weights import MasterWeights
from trainer.model.families import TransformerConfig
from trainer.model.transformer import Stage, blocks_of
from trainer.optimizers import make_optimizer
from trainer.sections import Recipe
from trainer.stopwatch import Stopwatch
from trainer.threaded_io import use_threads_where_async_io_is_missing

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank. `grad_norm` is before clipping; inf when the step was skipped."""

    loss: float
    num_targets: int
    grad_norm: float
    loss_scale: float
    skipped: bool


@dataclass(frozen=True)
class EvalResult:
    loss: float
    num_targets: int


class Engine:
    """Trains one stage of the model on this rank."""

    def __init__(
        self,
        recipe: Recipe,
        plan: BatchPlan,
        config: TransformerConfig,
        mesh: Mesh,
        device: torch.device,
        *,
        deepspeed_config: dict[str, Any],
        fill: Callable[[nn.Module], None],
    ) -> None:
        """`fill` gives each block its initial or loaded weights. `deepspeed_config` is passed on as it is."""
        self.recipe = recipe
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self.watch = Stopwatch(device)
        self.notes: list[str] = []  # remarks for the console
        self.scaler = LossScaler.from_recipe(recipe.precision)
        self.zero_stage = recipe.zero.stage
        _prepare_deepspeed(recipe, self.notes)
        units = _Units(mesh)
        dtype = DTYPES[recipe.precision.dtype]
        masters = MasterWeights(mesh.dp, dtype, deepspeed_config)
        stage = Stage(
            config,
            blocks_of(config),
            dtype=dtype,
            recompute=recipe.train.recompute,
            group=mesh.tp,
            device=device,
            fill=masters.rounding(fill),
            partition=_partition(deepspeed_config, units) if self.zero_stage == 3 else lambda block: None,
        )
        self.specs: list[tuple[nn.Parameter, ShardSpec]] = [(p, spec) for _, p, spec in owned_specs(stage)]
        optimizer = make_optimizer(recipe, self.specs, device)
        with contextlib.redirect_stdout(_LogLines()):  # DeepSpeed prints memory reports at ZeRO-1 in bf16, asked or not
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=stage, optimizer=optimizer, config=deepspeed_config, mpu=units, dist_init_required=False
            )
        masters.restore(self.optimizer)
        if self.zero_stage in (1, 2):
            # Also in fp32: a NaN that reaches master weights or moments cannot be taken back.
            self.optimizer.check_grad_overflow = True

    @property
    def num_params(self) -> int:
        """Elements of the logical model on this stage; tied ones once."""
        return sum(
            piece.size[0] * (piece.size[1] if len(piece.size) > 1 else 1) for _, spec in self.specs for piece in spec.pieces
        )

    def step(self, micro_batches: Sequence[MicroBatch], *, step: int, lr: float) -> StepResult:
        """One optimizer step on this rank's micro-batches; `step` counts from 0 and names the dropout stream."""
        self.deepspeed.train()
        num_targets = self._total(sum(batch.num_targets for batch in micro_batches))
        if num_targets == 0:
            raise DataError(f"step {step} has no target: every label of its {self.plan.global_sequences} sequences is masked")
        factor = self.plan.loss_factor(num_targets)
        scale = self.scaler.scale
        if self.zero_stage and self.recipe.precision.dtype == "fp16":
            self.optimizer.override_loss_scale(scale)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            torch.manual_seed(derive_seed(self.recipe.run.seed, "dropout", step, self._first_sequence(index)))
            with self.watch("forward"):
                batch_loss = self._forward(batch)
            with self.watch("backward"):
                loss_sum += batch_loss.detach().double()
                self._backward(batch_loss * factor, scale)
        with self.watch("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            grad_norm, skipped = self._update(scale)
            self.scaler.update(overflow=skipped)
        loss = float(all_reduce(loss_sum, self.mesh.dp)) / num_targets
        return StepResult(loss, num_targets, grad_norm, scale, skipped)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[MicroBatch]) -> EvalResult:
        """Mean loss over the targets of all ranks' micro-batches; each rank must bring the same number of them."""
        self.deepspeed.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        targets = 0
        for batch in micro_batches:
            loss_sum += self._forward(batch).double()
            targets += batch.num_targets
        num_targets = self._total(targets)
        if num_targets == 0:
            raise DataError("the evaluation has no target: every label is masked")
        return EvalResult(float(all_reduce(loss_sum, self.mesh.dp)) / num_targets, num_targets)

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] of the token after `tokens`, fp32 on the CPU. Every rank of the mesh must call it together."""
        self.deepspeed.eval()
        tokens_BS = torch.tensor([list(tokens)], device=self.device)
        logits_BSV = self.deepspeed.module(tokens_BS, Documents.whole_rows(1, len(tokens)))
        return logits_BSV[0, -1].float().cpu()

    def local_tensors(self) -> Iterator[tuple[ShardSpec, Tensor]]:
        """Each parameter that this rank owns, whole along the data-parallel axis, in the order of the model.

        Under ZeRO-3 one parameter is gathered at a time, so every data-parallel rank must iterate together.
        """
        for parameter, spec in self.specs:
            gathered = deepspeed.zero.GatheredParameters([parameter]) if self.zero_stage == 3 else contextlib.nullcontext()
            with gathered:
                yield spec, parameter.detach()

    def close(self) -> None:
        self.deepspeed.destroy()

    def _forward(self, batch: MicroBatch) -> Tensor:
        tokens_BS = batch.tokens_BS.to(self.device, non_blocking=True)
        labels_BS = batch.labels_BS.to(self.device, non_blocking=True)
        return self.deepspeed(tokens_BS, Documents(batch.documents), labels_BS)

    def _backward(self, loss: Tensor, scale: float) -> None:
        # At stage 0 DeepSpeed trains in fp32 and scales nothing; at stages 1 to 3 it multiplies by the scale we gave it.
        self.deepspeed.backward(loss * scale if self.zero_stage == 0 else loss, scale_wrt_gas=False)

    def _update(self, scale: float) -> tuple[float, bool]:
        """Apply the accumulated gradient, or skip when it is not finite; (norm before clipping, skipped)."""
        if self.zero_stage:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm()), bool(self.optimizer.overflow)
        parameters = [p for p, _ in self.specs if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]) / scale
        if not torch.isfinite(norm):
            self.deepspeed.zero_grad()
            return float("inf"), True
        clip = self.recipe.train.clip_norm
        # 1e-6 as in torch's and DeepSpeed's own clipping, so that all stages take the same step.
        shrink = min(1.0, clip / (float(norm) + 1e-6)) / scale if clip else 1.0 / scale
        if shrink != 1.0:
            torch._foreach_mul_([p.grad for p in parameters], shrink)
        self.deepspeed.step()
        return float(norm), False

    def _first_sequence(self, micro_batch: int) -> int:
        """Place in the step of this micro-batch's first sequence: the same in every data-parallel layout."""
        return self.mesh.dp.rank * self.plan.sequences_per_rank + micro_batch * self.plan.micro_sequences

    def _total(self, count: int) -> int:
        return int(all_reduce(torch.tensor(count, dtype=torch.int64, device=self.device), self.mesh.dp))


class _LogLines(io.TextIOBase):
    """A stdout whose lines go to this rank's log."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logger.info(line.rstrip())
        return len(text)


class _Units:
    """The mesh in the words that DeepSpeed asks for (its `mpu`).

    Its "model parallel" ranks are those that hold one copy of the model together: gradient norms are summed over them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._groups: dict[str, Group] = {
            "data_parallel": mesh.dp,
            "model_parallel": mesh.replica,
            "tensor_model_parallel": mesh.tp,
        }

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


def _prepare_deepspeed(recipe: Recipe, notes: list[str]) -> None:
    """Settle before `initialize` what DeepSpeed would otherwise decide by itself."""
    if not deepspeed.comm.is_initialized():
        # Its shared-memory collectives serve inference only; without this they are compiled at first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    accelerator = get_accelerator()
    if recipe.precision.dtype == "fp16" and accelerator.device_name() == "cpu":
        # The CPU accelerator denies fp16 without AVX512-FP16; torch computes it all the same, slower.
        accelerator.is_fp16_supported = lambda: True
    if "nvme" in (recipe.zero.offload_optimizer.device, recipe.zero.offload_param.device):
        remark = use_threads_where_async_io_is_missing()
        notes += [remark] if remark else []
    if recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)


def _partition(deepspeed_config: dict[str, Any], units: _Units) -> Callable[[nn.Module], None]:
    """Divide a block's weights over the data-parallel ranks as soon as it is built (ZeRO-3)."""
    swapper: list[Any] = []

    def partition(block: nn.Module) -> None:
        init = deepspeed.zero.Init(
            module=block,
            data_parallel_group=units.get_data_parallel_group(),
            config_dict_or_path=deepspeed_config,
            param_swapper=swapper[0] if swapper else None,
            mpu=units,
        )
        if init.param_swapper is not None and not swapper:
            swapper.append(init.param_swapper)

    return partition
