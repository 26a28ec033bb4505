"""A checkpoint or a Hugging Face folder, opened in any layout without an optimizer, for evaluation
and the harness.

The recipe is the one that a checkpoint was saved with, except for the layout, which `--set` alone
decides; the remaining ranks divide the data. Weights are read box by box, so each rank has its own
part of them, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from parallel.mesh import Mesh
from parallel.params import owned_specs
from trainer.checkpoint.resume import examine
from trainer.checkpoint.weights import Filling
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import make_tokenizer, reopen_tokenizer
from trainer.engine.compute_format import format_of_devices
from trainer.engine.evaluator import Evaluator
from trainer.engine.execution import DTYPES, make_execution
from trainer.engine.first_weights import first_weights
from trainer.engine.group import joined
from trainer.engine.master_weights import require_in_range
from trainer.inference.weights import Weights
from trainer.launch.ranks import Place, together
from trainer.model.measures import Measures, measures_of
from trainer.model.network import Network
from trainer.recipe import ResolvedRecipe, load_given
from trainer.recipe.batch_plan import BatchPlan, layout_of
from trainer.schema import Guard, Recipe
from trainer.tuning.adapt import quantizing


@dataclass(frozen=True)
class OpenModel:
    """An opened model, on every rank of the mesh."""

    weights: Weights
    recipe: Recipe
    place: Place
    mesh: Mesh
    plan: BatchPlan
    network: Network
    tokenizer: Tokenizer
    measures: Measures
    evaluator: Evaluator

    @property
    def described(self) -> dict[str, Any]:
        """Return the description of the model and its layout, as JSON values."""
        return {
            "weights": str(self.weights.folder),
            "step": self.weights.step,
            "layout": {axis: degree for axis, degree in asdict(self.mesh.layout).items() if degree > 1},
            "precision": self.recipe.precision.settled,
        }


@contextmanager
def open_model(name: str, settings: Sequence[str], *, files: Sequence[Mapping[str, Any]] = ()) -> Iterator[OpenModel]:
    """Open a model on every rank that the launcher started. `settings`: those of --set.

    RecipeError or DataError, on the first rank that finds a mistake.
    """
    place = Place.from_environment(os.environ)
    timeout = timedelta(seconds=Guard().long_timeout_s)
    with ExitStack() as stack:
        group = stack.enter_context(joined(place, timeout))
        with together():
            weights = Weights.named(name)
            resolved = _in_layout(load_given(weights.given(files=files), weights.folder, settings), place)
        mesh, messages = group.mesh(resolved.recipe.parallel), group.messages()
        with together():
            if resolved.recipe.precision.dtype is None:
                resolved = resolved.settled(format_of_devices(place.device, messages))
            recipe = resolved.recipe
            if weights.manifest is not None:
                examine(weights.folder, messages)
            tokenizer = reopen_tokenizer(weights.config) if weights.manifest else make_tokenizer(str(weights.config))
            network, fill = first_weights(resolved, tokenizer, recipe.data.classes, resumed=weights.manifest is not None)
            if weights.manifest is not None:
                fill = Filling(weights.folder, weights.manifest)
            plan = BatchPlan.from_recipe(recipe, place.world_size, place.how)
        measures, watch = measures_of(recipe.data.task, network), group.watch
        with together():
            execution = make_execution(
                network,
                recipe,
                plan,
                mesh,
                place.device,
                measures=measures,
                watch=watch,
                fill=_rounding(quantizing(fill, recipe.tuning), DTYPES[recipe.precision.settled]),
            )
        if recipe.data.isolate_documents:
            execution.settle_lengths(place.device, plan.row_tokens, may_call_apart=True)
        yield OpenModel(
            weights=weights,
            recipe=recipe,
            place=place,
            mesh=mesh,
            plan=plan,
            network=network,
            tokenizer=tokenizer,
            measures=measures,
            evaluator=Evaluator(execution, measures, mesh, place.device, watch, vocab_size=network.vocab_size),
        )


def _rounding(fill: Callable[[nn.Module], None], dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Return a `fill` after which a block is in the compute format, to which its layers would
    otherwise round it at every use."""

    def fill_and_round(block: nn.Module) -> None:
        fill(block)
        for _, parameter, spec in owned_specs(block):
            require_in_range(parameter, spec, dtype)
            parameter.data = parameter.data.to(dtype)

    return fill_and_round


def _in_layout(resolved: ResolvedRecipe, place: Place) -> ResolvedRecipe:
    """Return the recipe with a batch that the ranks can divide; it is never trained."""
    recipe = resolved.recipe
    dp = layout_of(recipe.parallel, place.world_size, place.how).dp
    sequences = recipe.batch.micro_sequences * dp * recipe.parallel.pipeline * recipe.parallel.virtual_stages
    batch = recipe.batch.model_copy(update={"global_sequences": sequences})
    return replace(resolved, recipe=recipe.model_copy(update={"batch": batch}))
