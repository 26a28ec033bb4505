"""AdaLoRA's division of a budget of ranks (Zhang et al. 2023, arXiv:2303.10512, §3.2 and 3.3), with
peft's constants.

Beside a module there are A [R, I], B [O, R] and E [R, 1]; a triplet is a row of A, a column of B
and a value of E. Each step does the following:

* The factors are pulled towards orthonormal directions: w / n · Σ ‖A Aᵀ − 1‖_F + ‖Bᵀ B − 1‖_F over
  the n factors of the whole model is minimised beside the loss. Its gradient depends only on the
  weights, so it is computed once for a step and added to the first gradient of each factor.
* An element's sensitivity is |weight · gradient|. Its importance is the running mean of its
  sensitivity, times the running mean of the distance of its sensitivity from that mean. The
  importance of a triplet is that of E, and the means over its row and its column.
* The triplets of the whole model compete. The value in E of those below the threshold is set to 0,
  and the number of the others falls along a cubic curve.

Gradients are taken where they leave autograd, so that they are whole at every ZeRO stage. Matrices
R × R and scores R wide are summed over the ranks that have one copy of the model, in one message
each; all ranks compute the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.mesh import Mesh
from parallel.params import AuxiliaryState, ShardSpec
from parallel.pieces import Piece
from trainer.model.config import TransformerConfig
from trainer.model.network import Network
from trainer.schema import RankBudget, Recipe
from trainer.tuning.targets import parts_of, targeted_modules

SECOND, VALUES = 1, 2  # indices of B and E in what `parts_of` lists after A


@dataclass
class _Factor:
    """A local factor, and statistics of its elements in tensors of its shape. `grad`: the gradient
    of the step so far. `kept`: of E, which values stay. `pull`: the gradient of the orthogonality
    term, until the hook has added it."""

    parameter: nn.Parameter
    spec: ShardSpec
    grad: Tensor
    sensitivity: Tensor
    uncertainty: Tensor
    kept: Tensor
    pull: Tensor | None = None

    def hook(self, grad: Tensor) -> Tensor:
        """Add the orthogonality term to a gradient of the parameter, accumulate the sum, and return
        the gradient for DeepSpeed."""
        if self.pull is not None:
            grad, self.pull = (grad + self.pull).to(grad.dtype), None
        self.grad += grad
        return grad


class RankAllocator:
    """The budget of ranks between steps: `begin` before the first gradient, `end` after the update.
    Every rank must call them together."""

    def __init__(
        self,
        recipe: Recipe,
        config: Network,
        specs: Sequence[tuple[nn.Parameter, ShardSpec]],
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        *,
        gathered: Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]],
    ) -> None:
        """Register hooks on the factors. `gathered`: a context in which the given parameters are
        whole; all data-parallel ranks enter it together."""
        assert isinstance(config, TransformerConfig), "family auto has no tuning"
        tuning = recipe.tuning
        self._keys, self._rank, self._steps = tuning.budget, tuning.rank, recipe.train.total_steps
        self._clip_norm, self._gathered = recipe.train.clip_norm, gathered
        self._mesh, self._device = mesh, device
        modules = targeted_modules(tuning, config)
        self._num_modules = len(modules)
        self._place = {
            part: (number, kind) for number, name in enumerate(modules) for kind, part in enumerate(parts_of(tuning, name))
        }
        mine = [(p, spec) for p, spec in specs if spec.pieces[0].name in self._place]
        # ZeRO-3 has only a part of it here
        shapes = [torch.Size(getattr(p, "ds_shape", p.shape)) for p, _ in mine]
        wide = torch.promote_types(dtype, torch.float32)
        self._grads = torch.zeros(sum(shape.numel() for shape in shapes), dtype=wide, device=device)
        grads = self._grads.split([shape.numel() for shape in shapes])
        self._factors = [
            _Factor(
                p,
                spec,
                grad.view(shape),
                torch.zeros_like(grad.view(shape)),
                torch.zeros_like(grad.view(shape)),
                torch.ones(shape, dtype=torch.bool, device=device),
            )
            for (p, spec), shape, grad in zip(mine, shapes, grads, strict=True)
        ]
        for factor in self._factors:
            factor.parameter.register_hook(factor.hook)

    @property
    def auxiliary(self) -> list[AuxiliaryState]:
        """The tensors that a checkpoint saves."""
        return [
            AuxiliaryState.of(factor.spec, getattr(factor, state), state=state)
            for factor in self._factors
            for state in ("sensitivity", "uncertainty", *(["kept"] if self._kind(factor) == VALUES else []))
        ]

    @torch.no_grad()
    def begin(self, scale: float) -> None:
        """Prepare a step whose loss is multiplied with `scale`."""
        self._grads.zero_()
        if not self._keys.orthogonality:
            return
        excess = torch.zeros((self._num_modules, 2, self._rank, self._rank), dtype=self._grads.dtype, device=self._device)
        with self._whole():
            directions = [
                # ZeRO's weights are in the dtype of the run, whose 8 bits are too few to measure
                # the distance from orthonormal.
                (factor, piece, at, self._directions(piece.in_parameter(factor.parameter), at[1]).to(excess.dtype))
                for factor in self._factors
                for piece, at in self._pieces(factor)
                if at[1] != VALUES
            ]
            for factor, _, at, own_RN in directions:
                if factor.spec.owned:
                    excess[at] += own_RN @ own_RN.t()
            excess = all_reduce(excess, self._mesh.replica) - torch.eye(self._rank, dtype=excess.dtype, device=self._device)
            lengths = torch.linalg.matrix_norm(excess, keepdim=True)
            # d‖D Dᵀ − 1‖_F / dD = 2 (D Dᵀ − 1) D / ‖D Dᵀ − 1‖_F, and 0 where that is 0
            slopes = torch.where(lengths > 0, 2.0 * excess / lengths, 0.0)
            weight = self._keys.orthogonality / (2 * self._num_modules) * scale
            for factor, piece, at, own_RN in directions:
                if factor.pull is None:
                    factor.pull = torch.zeros_like(factor.grad)
                self._directions(piece.in_parameter(factor.pull), at[1]).copy_(weight * (slopes[at] @ own_RN))

    @torch.no_grad()
    def end(self, step: int, *, scale: float, grad_norm: float, skipped: bool) -> Mapping[str, Tensor]:
        """Return, after a step (from 0) and by name, which values of E [R, 1] stay; {} where none
        changes."""
        last = self._steps - self._keys.final_steps
        if step < last and not skipped:
            # 1e-6 as in torch's clipping: importance uses the gradient that made the update.
            clipping = min(1.0, self._clip_norm / (grad_norm + 1e-6)) if self._clip_norm else 1.0
            self._observe(clipping / scale)
        budget = budget_after(step, self._keys, self._steps, modules=self._num_modules, rank=self._rank)
        if budget is not None:
            self._allocate(budget)
        elif step <= last:
            return {}
        values = [factor for factor in self._factors if self._kind(factor) == VALUES]
        return {piece.name: piece.in_parameter(factor.kept) for factor in values for piece in factor.spec.pieces}

    def _observe(self, unscaling: float) -> None:
        """Add this step's sensitivities to the running means."""
        grads = all_reduce(self._grads, self._mesh.reduction) * (unscaling / self._mesh.reduction.size)
        decay, decay_of_uncertainty = self._keys.betas
        with self._whole():
            for factor, grad in zip(self._factors, grads.split([f.grad.numel() for f in self._factors]), strict=True):
                now = (factor.parameter * grad.view(factor.grad.shape)).abs()
                factor.sensitivity.mul_(decay).add_(now, alpha=1.0 - decay)
                surprise = (now - factor.sensitivity).abs()
                factor.uncertainty.mul_(decay_of_uncertainty).add_(surprise, alpha=1.0 - decay_of_uncertainty)

    def _allocate(self, budget: int) -> None:
        """Keep the `budget` most important triplets of the whole model."""
        scores = self._scores()
        if not scores.any():  # every step so far was skipped
            return
        threshold = scores.flatten().kthvalue(scores.numel() - budget).values
        for factor in self._factors:
            for piece, (module, kind) in self._pieces(factor):
                if kind == VALUES:
                    piece.in_parameter(factor.kept).copy_((scores[module] > threshold).unsqueeze(-1))

    def _scores(self) -> Tensor:
        """Return the scores [modules, R] of the whole model: E's importance, and the means over a
        triplet's row of A and column of B."""
        scores = torch.zeros((self._num_modules, self._rank), dtype=self._grads.dtype, device=self._device)
        for factor in (factor for factor in self._factors if factor.spec.owned):
            importance = factor.sensitivity * factor.uncertainty
            for piece, (module, kind) in self._pieces(factor):
                own_RN = self._directions(piece.in_parameter(importance), kind)
                scores[module] += own_RN.sum(-1) / piece.shape[0 if kind == SECOND else 1]
        return all_reduce(scores, self._mesh.replica)

    def _pieces(self, factor: _Factor) -> Iterator[tuple[Piece, tuple[int, int]]]:
        """Return a factor's pieces, each with the number of its module and its kind (A, B or E)."""
        return ((piece, self._place[piece.name]) for piece in factor.spec.pieces)

    def _kind(self, factor: _Factor) -> int:
        return self._place[factor.spec.pieces[0].name][1]

    def _directions(self, part: Tensor, kind: int) -> Tensor:
        """Return a part of any factor as [R, N], a row for each triplet."""
        return part.t() if kind == SECOND else part

    def _whole(self) -> AbstractContextManager[Any]:
        return self._gathered([factor.parameter for factor in self._factors])


def budget_after(step: int, keys: RankBudget, steps: int, *, modules: int, rank: int) -> int | None:
    """Return how many triplets stay after a step (from 0); None where the step changes nothing.

    The number falls along a cubic curve from `modules` · `rank` to the target (Zhang et al. 2023,
    eq. 12).
    """
    last = steps - keys.final_steps
    if step <= keys.warmup_steps or step > last or (step % keys.every and step != last):
        return None
    most, target = modules * rank, modules * keys.target_rank
    left = 1.0 - (step - keys.warmup_steps) / (last - keys.warmup_steps)
    return int((most - target) * left**3 + target)


def trimmed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the factors without the triplets whose value is 0, and peft's pattern of the remaining
    ranks of each module. All triplets stay where nothing has been learned yet."""
    values = {name: tensor.flatten() for name, tensor in tensors.items() if name.endswith(".lora_E")}
    if not any(tensor.any() for tensor in values.values()):
        return tensors, {"rank_pattern": None}
    left = {name.removesuffix(".lora_E"): value != 0 for name, value in values.items()}
    cut = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".")
        if module not in left:  # rows of new tokens
            cut[name] = tensor
            continue
        cut[name] = (tensor[:, left[module]] if factor == "lora_B" else tensor[left[module]]).contiguous()
    return cut, {"rank_pattern": {f"{module}.lora_E": kept.tolist() for module, kept in left.items()} or None}
