"""The one place that speaks to DeepSpeed: it takes a stage of the model and runs training steps.

`deepspeed.initialize` is called plainly (`deepspeed_start.py`) at every ZeRO stage. DeepSpeed
divides optimizer state, gradients and weights, offloads, reduces, and keeps the fp32 master weights
at stages 1 to 3. We set the first values of these, the normalisation constant, the loss scale and
the learning rate. At stage 0, where DeepSpeed has no fp32 accumulation for half precision, we also
compute the norm, clip and skip.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.fusable import FUSING
from parallel.gather import gather_to_first
from parallel.mesh import Group, Mesh
from parallel.params import AuxiliaryState, ShardSpec, owned_specs
from parallel.rng import Streams
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_start import Units, partitioning, prepare, require_swap_buffers, start, whole
from trainer.engine.evaluator import Evaluator
from trainer.engine.execution import DTYPES, make_execution
from trainer.engine.loss_scale import LossScaler
from trainer.engine.master_weights import MasterWeights
from trainer.engine.optimizers import groups_of, make_optimizer
from trainer.engine.step_result import StepResult
from trainer.engine.tiling import Tiling
from trainer.engine.zero_state import BY_STAGE
from trainer.errors import DataError
from trainer.model.measures import measures_of
from trainer.model.network import Network
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Recipe
from trainer.stopwatch import Stopwatch
from trainer.tuning.adapt import quantized_weights, quantizing
from trainer.tuning.builders import step_hooks
from trainer.update_rules import rule_of


class Engine:
    """The training of this rank's part of the model."""

    def __init__(
        self,
        recipe: Recipe,
        plan: BatchPlan,
        network: Network,
        mesh: Mesh,
        device: torch.device,
        *,
        deepspeed_config: dict[str, Any],
        fill: Callable[[nn.Module], None],
        watch: Stopwatch | None = None,
    ) -> None:
        """Build this rank's part. `fill` gives each block its initial or loaded weights;
        `deepspeed_config` is passed on as it is."""
        self.recipe = recipe
        self.plan = plan
        self.network = network
        self.mesh = mesh
        self.device = device
        self.watch = watch or Stopwatch(device)
        self.notes: list[str] = []  # remarks for the console
        self._unread: list[StepResult] = []
        # steps only: an evaluation gives the same numbers in any run
        self.compiles = bool(recipe.train.compile)
        self.scaler = LossScaler.from_recipe(recipe.precision)
        self.zero_stage = recipe.zero.stage
        self.measures = measures_of(recipe.data.task, network)
        dtype = DTYPES[recipe.precision.settled]
        prepare(recipe, dtype, self.notes)
        units = Units(mesh)
        masters = MasterWeights(mesh.reduction, dtype, deepspeed_config)
        self.execution = make_execution(
            network,
            recipe,
            plan,
            mesh,
            device,
            measures=self.measures,
            watch=self.watch,
            fill=masters.rounding(quantizing(fill, recipe.tuning)),
            partition=partitioning(deepspeed_config, units) if self.zero_stage == 3 else lambda block: None,
        )
        self.evaluator = Evaluator(self.execution, self.measures, mesh, device, self.watch, vocab_size=network.vocab_size)
        module = self.execution.module
        self.constants = self.execution.constants
        self.quantized = quantized_weights(module)  # frozen, and not parameters of torch
        self.specs: list[tuple[nn.Parameter, ShardSpec]] = [(p, spec) for _, p, spec in owned_specs(module)]
        for parameter, spec in self.specs:
            # DeepSpeed's mark: on every rank but the first only marked parameters count in the
            # norm.
            parameter.model_parallel = spec.owned  # type: ignore[attr-defined]
        require_swap_buffers(recipe, [parameter for parameter, _ in self.specs])
        tiling = self._tiling()
        optimizer = make_optimizer(recipe, self.specs, device, tiling=tiling)
        self.deepspeed, self.optimizer = start(
            module, optimizer, deepspeed_config, units, groups_are_tiles=tiling.tile is not None
        )
        self.execution.attach(self.deepspeed)
        if dtype == torch.float64:
            self.deepspeed.communication_data_type = dtype  # DeepSpeed's dict has no name for it
        masters.restore(self.optimizer)
        if self.zero_stage in (1, 2):
            # In fp32 too: a NaN that reaches master weights or moments stays there.
            self.optimizer.check_grad_overflow = True
        gathered = partial(whole, zero_stage=self.zero_stage)
        self.hooks = step_hooks(recipe, network, self.specs, mesh, device, dtype, gathered=gathered)
        auxiliary = [state for hook in self.hooks for state in hook.auxiliary]
        auxiliary += [
            AuxiliaryState.of(*part, state=state) for weight in self.quantized for state, part in weight.stored.items()
        ]
        self.state = BY_STAGE[self.zero_stage](
            self.optimizer,
            self.specs,
            self.constants,
            auxiliary,
            rule=rule_of(recipe.optimizer),
            group=mesh.reduction,
        )
        self.execution.require_causal(device)
        if recipe.data.isolate_documents:
            self.notes += self.execution.settle_lengths(device, plan.row_tokens, may_call_apart=self.zero_stage < 3)

    def _tiling(self) -> Tiling:
        """Return the way all ranks of the replica cut parameters into groups."""
        own = Tiling.of(self.recipe)
        trained = sum(parameter.requires_grad for parameter, _ in self.specs)
        numbers = torch.tensor([len(groups_of(self.specs, own)), -trained], device=self.device)
        most, minus_fewest = all_reduce(numbers, self.mesh.replica, dist.ReduceOp.MAX).tolist()
        return own.together([most], [-minus_fewest])

    @property
    def num_params(self) -> int:
        """The number of elements of the whole logical model, tied ones once. Every rank must ask
        together."""
        specs = [*(spec for _, spec in self.specs), *(weight.spec for weight in self.quantized)]
        owned = sum(math.prod(piece.size) for spec in specs if spec.owned for piece in spec.pieces)
        return int(self._total(owned, self.mesh.replica))

    def step(self, micro_batches: Sequence[MicroBatch], *, step: int, lr: float, norm_limit: float = math.inf) -> StepResult:
        """Take one optimizer step. `step`, from 0, names the dropout streams; a gradient norm above
        `norm_limit` skips the update (ZeRO-0 only)."""
        scale = self.scaler.scale
        for hook in self.hooks:
            hook.begin(scale)
        sums, num_targets = self._gradients(micro_batches, step, scale)
        with self.watch("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            result = self._update(scale, norm_limit, sums, num_targets, unread=self._unread)
            self._require_targets(step, result)
            for hook in self.hooks:
                kept = hook.end(step, scale=scale, grad_norm=result.grad_norm, skipped=result.skipped)
                self.state.clear(kept)
            self.scaler.update(overflow=result.skipped and math.isinf(result.grad_norm))
        return result

    def replay(self, micro_batches: Sequence[MicroBatch], *, step: int, scale: float) -> None:
        """Run forward and backward of a step that was skipped once more, for hooks to watch.

        The computation is the same to the bit: the weights have not changed, and dropout is drawn
        by the number of the step. Every gradient is made NaN as it leaves autograd, so that this
        update is skipped too, at any ZeRO stage, even where the first NaN does not come again.
        """
        trained = [parameter for parameter, _ in self.specs if parameter.requires_grad]
        spoilers = [parameter.register_hook(lambda grad: torch.full_like(grad, math.nan)) for parameter in trained]
        try:
            self._update(scale, math.inf, *self._gradients(micro_batches, step, scale))
        finally:
            for spoiler in spoilers:
                spoiler.remove()

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Run forward and backward of micro-batches, and leave everything as it was: the loss is
        multiplied with NaN, so that this update is skipped at any ZeRO stage."""
        scale = self.scaler.scale
        self._update(scale, math.inf, *self._gradients(micro_batches, 0, scale, factor=math.nan))

    def _gradients(
        self, micro_batches: Sequence[MicroBatch], step: int, scale: float, factor: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward. Return this data-parallel rank's sums over its targets, and the
        number of targets of the step, which stays on the device. `factor`: of the loss, in place of
        the plan's."""
        self.deepspeed.train()
        num_targets = self._total(sum(map(self.measures.num_targets, micro_batches)), self.mesh.reduction)
        if factor is None:
            factor = self.plan.loss_factor(num_targets, averaged_over=self.mesh.reduction.size)
        if self.zero_stage and self.recipe.precision.settled == "fp16":
            self.optimizer.override_loss_scale(scale)
        batches = [batch.on(self.device, self._streams(step, index)) for index, batch in enumerate(micro_batches)]
        with FUSING(self.compiles):
            return self.execution.step(batches, factor=factor, scale=scale), num_targets

    def local_tensors(self) -> Iterator[tuple[ShardSpec, Tensor]]:
        """Yield each parameter that this rank owns, in the order of the model, whole along the
        data-parallel axis.

        ZeRO-3 gathers one parameter at a time, so every data-parallel rank must iterate together.
        """
        for parameter, spec in self.specs:
            with whole([parameter], zero_stage=self.zero_stage):
                yield spec, parameter.detach()
        yield from self.constants
        yield from ((weight.spec, weight.dequantized(DTYPES[self.recipe.precision.settled])) for weight in self.quantized)

    def gathered_tensors(self) -> Iterator[tuple[ShardSpec, Tensor]]:
        """Yield the parameters of the whole model on the first rank of the mesh, nothing elsewhere.
        All ranks must iterate."""
        tensors = self.local_tensors()
        if self.mesh.reduction.rank == 0:
            yield from gather_to_first(tensors, self.mesh.replica, self.device)
        else:
            for _ in tensors:  # ZeRO-3 gathers them from these ranks too
                pass

    def close(self) -> None:
        self.deepspeed.destroy()

    def _update(
        self, scale: float, norm_limit: float, sums: Tensor, num_targets: Tensor, *, unread: list[StepResult] | None = None
    ) -> StepResult:
        """Apply the accumulated gradient, or skip it when its norm is not finite or too large."""
        means = all_reduce(sums, self.mesh.reduction) / num_targets
        result = partial(StepResult, means, num_targets, loss_scale=scale, record=self.measures.step_record, unread=unread)
        if self.zero_stage == 0:
            return self._update_undivided(norm_limit, result(self._norm(scale)))
        self.deepspeed.step()
        skipped = bool(self.optimizer.overflow)
        if skipped and self.zero_stage < 3:
            # With CPU offload DeepSpeed 0.19 keeps the gradient sums of a half format with
            # their NaN, so that no later step would be finite.
            vars(self.optimizer).get("averaged_gradients", {}).clear()
        return result(self.deepspeed.get_global_grad_norm(), skipped=skipped)

    def _norm(self, scale: float) -> Tensor:
        """Return the norm of the whole gradient at stage 0."""
        owned = torch.nn.utils.get_total_norm([p.grad for p, spec in self.specs if p.grad is not None and spec.owned])
        return all_reduce(owned.square(), self.mesh.replica).sqrt() / scale

    def _update_undivided(self, norm_limit: float, result: StepResult) -> StepResult:
        """Apply the clipped gradient of stage 0, unless its norm forbids it."""
        norm = result.grad_norm
        if norm > min(norm_limit, sys.float_info.max):
            self.deepspeed.zero_grad()
            result.skipped = True
            return result
        clip, scale = self.recipe.train.clip_norm, result.loss_scale
        # 1e-6 as in torch's and DeepSpeed's own clipping, so that all stages take the same step.
        shrink = min(1.0, clip / (norm + 1e-6)) / scale if clip else 1.0 / scale
        if shrink != 1.0:
            torch._foreach_mul_([p.grad for p, _ in self.specs if p.grad is not None], shrink)
        self.deepspeed.step()
        return result

    def _require_targets(self, step: int, result: StepResult) -> None:
        """Raise DataError for a step without a target. Its gradient is not finite, so it is never
        applied; on a GPU the number is read only where a step was skipped."""
        if (result.skipped or result.is_read) and result.num_targets == 0:
            raise DataError(f"step {step} has no target: every label of its {self.plan.global_sequences} sequences is masked")

    def _streams(self, step: int, micro_batch: int) -> Streams:
        """Return the random streams of this rank's micro-batch. They are named after the numbers of
        its sequences in the step, not after ranks."""
        size = self.plan.micro_sequences
        first = self.mesh.data.rank * self.plan.sequences_per_rank + micro_batch * size
        return Streams.of_step(self.recipe.run.seed, step, range(first, first + size))

    def _total(self, count: int, group: Group) -> Tensor:
        """Return the sum over the group, a float64 on the device, which has such counts exactly."""
        return all_reduce(torch.tensor(count, dtype=torch.float64, device=self.device), group)
