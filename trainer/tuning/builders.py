"""The methods of tuning, a row each, as far as they need torch: the parameters beside a linear
layer, the way they are merged, their keys in peft's format, and the work between steps.

A row tells what is put beside a linear layer, how a weight takes it up, what peft is told, and what
is done between steps. Shape letters: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.bottleneck import Bottleneck
from parallel.linear import Beside, ColumnParallelLinear, RowParallelLinear
from parallel.low_rank import ColumnLowRank, LowRank, RowLowRank
from parallel.mesh import Mesh
from parallel.params import AuxiliaryState, ShardSpec
from parallel.rescaling import InputRescaling, OutputRescaling
from trainer.model.config import TransformerConfig
from trainer.model.names import names_of
from trainer.model.network import Network
from trainer.schema import Recipe, Tuning
from trainer.tuning.rank_budget import RankAllocator, trimmed
from trainer.tuning.targets import target_modules


class StepHook(Protocol):
    """The work of a method between steps. Every rank must call it together."""

    @property
    def auxiliary(self) -> Sequence[AuxiliaryState]:
        """The tensors that a checkpoint has of it."""

    def begin(self, scale: float) -> None:
        """Prepare a step whose loss is multiplied with `scale`."""

    def end(self, step: int, *, scale: float, grad_norm: float, skipped: bool) -> Mapping[str, Tensor]:
        """Return, after a step (from 0), a bool tensor for each logical tensor whose elements
        change: those that are False are set to 0. {}: none changes."""


@dataclass(frozen=True)
class LayerBuilder:
    """A way to tune one kind of linear layer.

    `beside`: makes the parameters beside a layer, for those of its outputs that belong to the given
    modules. `merged`: returns the weight [O, I] with the parts of its module merged; None: they
    cannot be merged. `merged_bias`: the same for the bias [O]; None: it does not change.
    """

    beside: Callable[[Any, Collection[str], Tuning], Beside]
    merged: Callable[[Tensor, Sequence[Tensor], Tuning], Tensor] | None = None
    merged_bias: Callable[[Tensor, Sequence[Tensor], Tuning], Tensor] | None = None


def _as_they_are(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return tensors, {}


@dataclass(frozen=True)
class InPeft:
    """A method in peft's format.

    `keys`: those of adapter_config.json that other methods do not have. `has_token_rows`: whether
    peft has rows of single tokens beside it. `trimmed`: the tensors as peft wants them, and the
    keys that say how they were changed.
    """

    keys: Callable[[Recipe, TransformerConfig], dict[str, Any]]
    has_token_rows: bool = True
    trimmed: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]] = _as_they_are


@dataclass(frozen=True, kw_only=True)
class Builder:
    """A method's layers. `column`, `row`: the way of tuning these kinds; None: they are not tuned.
    `in_peft`: None where peft does not have the method. `step_hook`: makes the hook that the
    engine calls at each step."""

    column: LayerBuilder | None = None
    row: LayerBuilder | None = None
    in_peft: InPeft | None = None
    step_hook: Callable[..., StepHook] | None = None


# ------------------------------------------------------------------------ low-rank factors


def lora_scale(tuning: Tuning) -> float:
    """Return alpha / r (Hu et al. 2021, arXiv:2106.09685, §4.1), or alpha / √r.

    With √r the learning rate need not change with the rank (Kalajdzievski 2023, arXiv:2312.03732).
    """
    return tuning.alpha / (math.sqrt(tuning.rank) if tuning.rank_stabilized else tuning.rank)


def adalora_scale(tuning: Tuning) -> float:
    """Return alpha / r for the rank at the start, plus 1e-5 in the divisor as in peft."""
    return tuning.alpha / (tuning.rank + 1e-5)


def _lora_merged(weight_OI: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    a_RI, b_OR = parts
    return weight_OI + lora_scale(tuning) * (b_OR @ a_RI)


def _dora_merged(weight_OI: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    """Return W + s · B A, its rows as long as they were trained to be."""
    *factors, magnitude_O = parts
    changed_OI = _lora_merged(weight_OI, factors, tuning)
    lengths_O: Tensor = torch.linalg.vector_norm(changed_OI, dim=-1)
    return changed_OI * (magnitude_O / lengths_O).unsqueeze(-1)


def _adalora_merged(weight_OI: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    """Return W + s · B diag(E) A."""
    a_RI, b_OR, e_R1 = parts
    return weight_OI + adalora_scale(tuning) * (b_OR @ (a_RI * e_R1))


def _low_rank(
    scale: Callable[[Tuning], float],
    merged: Callable[[Tensor, Sequence[Tensor], Tuning], Tensor],
    in_peft: InPeft,
    *,
    step_hook: Callable[..., StepHook] | None = None,
    **more_parts: bool,
) -> Builder:
    """Return the builder of factors beside a weight; `more_parts`: as `LowRank` calls them."""

    def keys(tuning: Tuning) -> LowRank:
        return LowRank(tuning.rank, scale(tuning), tuning.dropout, **more_parts)

    def column(layer: ColumnParallelLinear, modules: Collection[str], tuning: Tuning) -> Beside:
        return ColumnLowRank(layer, modules, keys(tuning))

    def row(layer: RowParallelLinear, modules: Collection[str], tuning: Tuning) -> Beside:
        return RowLowRank(layer, keys(tuning))

    return Builder(column=LayerBuilder(column, merged), row=LayerBuilder(row, merged), in_peft=in_peft, step_hook=step_hook)


def _factor_keys(tuning: Tuning) -> dict[str, Any]:
    return {"bias": "none", "lora_alpha": tuning.alpha, "lora_dropout": tuning.dropout, "init_lora_weights": True}


def _lora_keys(use_dora: bool) -> Callable[[Recipe, TransformerConfig], dict[str, Any]]:
    def keys(recipe: Recipe, network: TransformerConfig) -> dict[str, Any]:
        tuning = recipe.tuning
        own = {"r": tuning.rank, "use_rslora": tuning.rank_stabilized, "use_dora": use_dora}
        return {"peft_type": "LORA", **_factor_keys(tuning), **own}

    return keys


def _adalora_keys(recipe: Recipe, network: TransformerConfig) -> dict[str, Any]:
    tuning, budget = recipe.tuning, recipe.tuning.budget
    return {
        "peft_type": "ADALORA",
        **_factor_keys(tuning),
        "init_r": tuning.rank,
        "target_r": budget.target_rank,
        "tinit": budget.warmup_steps,
        "tfinal": budget.final_steps,
        "deltaT": budget.every,
        "beta1": budget.betas[0],
        "beta2": budget.betas[1],
        "orth_reg_weight": budget.orthogonality,
        "total_step": recipe.train.total_steps,
    }


# ------------------------------------------------------- (IA)³ and bottleneck adapters


def _rescaled_outputs(layer: ColumnParallelLinear, modules: Collection[str], tuning: Tuning) -> Beside:
    return OutputRescaling(layer, modules)


def _rescaled_inputs(layer: RowParallelLinear, modules: Collection[str], tuning: Tuning) -> Beside:
    return InputRescaling(layer)


def _ia3_merged(weight_OI: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    """Return the weight with its rows or columns multiplied: l is [O, 1] or [1, I]."""
    return weight_OI * parts[0]


def _ia3_merged_bias(bias_O: Tensor, parts: Sequence[Tensor], tuning: Tuning) -> Tensor:
    return bias_O * parts[0].flatten()


def _ia3_keys(recipe: Recipe, network: TransformerConfig) -> dict[str, Any]:
    names = names_of(network)
    scaled_inputs = {names.attention_out.format(layer=0), names.mlp_out.format(layer=0)}
    modules = target_modules(recipe.tuning, network, among=scaled_inputs)
    return {"peft_type": "IA3", "feedforward_modules": modules}


def _bottleneck(layer: RowParallelLinear, modules: Collection[str], tuning: Tuning) -> Beside:
    return Bottleneck(layer, tuning.bottleneck)


BUILDERS: Mapping[str, Builder] = {
    "lora": _low_rank(lora_scale, _lora_merged, InPeft(_lora_keys(use_dora=False))),
    "dora": _low_rank(lora_scale, _dora_merged, InPeft(_lora_keys(use_dora=True)), magnitude=True),
    "adalora": _low_rank(
        adalora_scale, _adalora_merged, InPeft(_adalora_keys, trimmed=trimmed), step_hook=RankAllocator, singular_values=True
    ),
    "ia3": Builder(
        column=LayerBuilder(_rescaled_outputs, _ia3_merged, _ia3_merged_bias),
        row=LayerBuilder(_rescaled_inputs, _ia3_merged),
        in_peft=InPeft(_ia3_keys, has_token_rows=False),
    ),
    "adapter": Builder(row=LayerBuilder(_bottleneck)),
}


NOTHING = Builder()


def builder_of(tuning: Tuning) -> Builder:
    """Return the row of the recipe's method; `NOTHING` where nothing is put beside a layer."""
    return BUILDERS.get(str(tuning.method), NOTHING)


def step_hooks(
    recipe: Recipe,
    network: Network,
    specs: Sequence[tuple[nn.Parameter, ShardSpec]],
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gathered: Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]],
) -> list[StepHook]:
    """Return what the recipe's method does between steps. `gathered`: a context in which those
    parameters are whole; all data-parallel ranks enter it together."""
    hook = builder_of(recipe.tuning).step_hook
    if hook is None:
        return []
    return [hook(recipe, network, specs, mesh, device, dtype, gathered=gathered)]
