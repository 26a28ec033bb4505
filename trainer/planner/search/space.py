"""The layouts of a recipe on a number of devices that its rules allow. No torch.

The rules are those of `trainer/recipe/`, asked once for each group of keys that they compare. What
a search shows has passed all of them as a recipe again (`admits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple, get_args

from parallel.schedules import SCHEDULES
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.errors import RecipeError
from trainer.model.config import TransformerConfig
from trainer.planner.devices import Device
from trainer.planner.prediction import with_format_of
from trainer.planner.search.choice import OF_ONE_STAGE, Choice, Offload, Recompute
from trainer.recipe import ResolvedRecipe, load_changed
from trainer.recipe.batch_plan import BatchPlan, divisors
from trainer.recipe.network import fit_findings
from trainer.recipe.pipeline import check_micro_batches, pipeline_findings
from trainer.recipe.rules import section_findings
from trainer.schema import Recipe

ZERO_STAGES = range(4)


class Mesh(NamedTuple):
    """The degrees of a layout; `sequences`: those of a step on each data-parallel rank."""

    tensor: int
    pipeline: int
    context: int
    data: int
    sequences: int


class States(NamedTuple):
    """The ZeRO stage, and the memories of optimizer and weights."""

    stage: int
    optimizer: Offload
    param: Offload


class Passes(NamedTuple):
    """A way to compute a micro-batch: in which mesh, of how many sequences, whether tensor ranks
    divide tokens, and what is computed again."""

    mesh: Mesh
    micro: int
    divides: bool
    recompute: Recompute

    @property
    def num_micro_batches(self) -> int:
        return self.mesh.sequences // self.micro

    def choice(self, schedule: str, virtual_stages: int, states: States) -> Choice:
        return Choice(
            tensor=self.mesh.tensor,
            pipeline=self.mesh.pipeline,
            virtual_stages=virtual_stages,
            schedule=schedule,
            context=self.mesh.context,
            divides_tokens=self.divides,
            zero_stage=states.stage,
            offload_optimizer=states.optimizer,
            offload_param=states.param,
            recompute=self.recompute,
            micro_sequences=self.micro,
        )


@dataclass(frozen=True)
class Space:
    """The layouts of a recipe with its global batch on a number of devices of one kind."""

    resolved: ResolvedRecipe
    network: TransformerConfig
    world_size: int
    device: Device

    @cached_property
    def base(self) -> Recipe:
        """The recipe in the compute format that is planned for."""
        return with_format_of(self.resolved.recipe, self.device)

    @cached_property
    def plain(self) -> Choice:
        """The choice that no rule refuses for its layout: nothing is divided."""
        return Choice(micro_sequences=self.base.batch.micro_sequences, recompute=self.base.train.recompute)

    def __iter__(self) -> Iterator[Choice]:
        for passes in self.passes:
            for schedule, virtual in self.pipelines(passes):
                for states in self.states(passes, schedule):
                    yield passes.choice(schedule, virtual, states)

    @cached_property
    def passes(self) -> list[Passes]:
        """The ways to compute a micro-batch in each mesh."""
        return [
            Passes(mesh, micro, divides, recompute)
            for mesh in self.meshes
            for micro in sorted(divisors(mesh.sequences))
            for divides, recompute in product(self.token_divisions(mesh.tensor, micro), self.recomputations)
        ]

    # ------------------------------------------------------------------------ degrees

    @cached_property
    def meshes(self) -> list[Mesh]:
        """The degrees that divide the devices, the network and the global batch."""
        found = []
        for tensor, context in product(self.tensors, self.contexts):
            rest, remainder = divmod(self.world_size, tensor * context)
            if remainder:
                continue
            for pipeline in sorted(divisors(rest)):
                data = rest // pipeline
                sequences, left = divmod(self.base.batch.global_sequences, data)
                if not left and self.has_layers(pipeline, 1):
                    found.append(Mesh(tensor, pipeline, context, data, sequences))
        return found

    @cached_property
    def tensors(self) -> list[int]:
        most = self.network.num_heads
        return [n for n in sorted(divisors(self.world_size)) if n <= most and self.allows(replace(self.plain, tensor=n))]

    @cached_property
    def contexts(self) -> list[int]:
        if not self.allows(replace(self.plain, context=2)):
            return [1]
        return [n for n in sorted(divisors(self.world_size)) if self.allows(replace(self.plain, context=n))]

    def has_layers(self, pipeline: int, virtual: int) -> bool:
        """Return whether each stage can have a layer."""
        return pipeline * virtual <= self.network.num_layers

    def allows(self, choice: Choice) -> bool:
        """Return whether no rule about keys and the network refuses a choice."""
        recipe = choice.recipe(self.base)
        return not any(True for _ in section_findings(recipe, ())) and not any(True for _ in fit_findings(recipe, self.network))

    # ------------------------------------------------------------------------ pipelines

    def pipelines(self, passes: Passes) -> list[tuple[str, int]]:
        """Return the schedules that take so many micro-batches, each with its stages on a rank."""
        count, ranks = passes.num_micro_batches, passes.mesh.pipeline
        return [one for one in self._schedules(ranks) if SCHEDULES[one[0]].accepts(count, ranks)]

    def _schedules(self, pipeline: int) -> list[tuple[str, int]]:
        if pipeline not in self._found_schedules:
            self._found_schedules[pipeline] = [*self._schedules_of(pipeline)]
        return self._found_schedules[pipeline]

    @cached_property
    def _found_schedules(self) -> dict[int, list[tuple[str, int]]]:
        return {}

    def _schedules_of(self, pipeline: int) -> Iterator[tuple[str, int]]:
        if pipeline == 1:
            yield OF_ONE_STAGE, 1
            return
        for name, schedule in SCHEDULES.items():
            wanted = schedule.virtual_stages
            # With one stage on a rank an interleaved schedule that keeps backwards whole is 1f1b or
            # gpipe.
            least = 1 if schedule.splits_backward else 2
            for virtual in [wanted] if wanted is not None else self._even_stages(pipeline):
                if self.has_layers(pipeline, virtual) and (wanted is not None or virtual >= least):
                    yield name, virtual

    def _even_stages(self, pipeline: int) -> list[int]:
        """Return the numbers of stages on a rank that have equally many layers, where the embedding
        and the head take the place of as many as they may."""
        most = self.network.num_layers // pipeline
        return sorted({n for layers in (most, most + 1) for n in divisors(layers) if n <= most})

    # ------------------------------------------------------------------------ within a mesh

    def token_divisions(self, tensor: int, micro: int) -> list[bool]:
        """Return whether the tensor ranks may, or may not, divide tokens."""
        if tensor == 1:
            return [False]
        return [True, False] if micro * self.base.data.seq_len % tensor == 0 else [False]

    @cached_property
    def recomputations(self) -> list[Recompute]:
        return [how for how in get_args(Recompute) if self.allows(replace(self.plain, recompute=how))]

    def states(self, passes: Passes, schedule: str) -> Sequence[States]:
        """Return the legal ZeRO stages with the places of optimizer and weights."""
        splits = passes.mesh.pipeline > 1 and SCHEDULES[schedule].splits_backward
        return self._states[passes.mesh.tensor > 1, splits]

    @cached_property
    def _states(self) -> dict[tuple[bool, bool], list[States]]:
        """The legal ones, by whether the tensor degree is above 1 and the schedule splits the
        backward."""
        found: dict[tuple[bool, bool], list[States]] = {}
        for divided, splits in product((False, True), repeat=2):
            tensor = next((n for n in self.tensors if n > 1), 1) if divided else 1
            found[divided, splits] = [
                states
                for states in map(States._make, product(ZERO_STAGES, get_args(Offload), get_args(Offload)))
                if self._allows_states(tensor, states, splits=splits)
            ]
        return found

    def _allows_states(self, tensor: int, states: States, *, splits: bool) -> bool:
        stage, optimizer, param = states
        choice = replace(self.plain, tensor=tensor, zero_stage=stage, offload_optimizer=optimizer, offload_param=param)
        paths = self.base.zero
        for device, path in ((optimizer, paths.offload_optimizer.nvme_path), (param, paths.offload_param.nvme_path)):
            if device == "nvme" and path is None:
                return False
        if splits and not self._may_split[stage]:
            return False
        return self.allows(choice)

    @cached_property
    def _may_split(self) -> list[bool]:
        """The answers, by ZeRO stage, to whether a schedule may split the backward."""
        name = next(name for name, schedule in SCHEDULES.items() if schedule.splits_backward and not schedule.v_shaped)
        choices = (replace(self.plain, pipeline=2, schedule=name, zero_stage=stage) for stage in ZERO_STAGES)
        return [
            not any("zero.stage" in finding.keys for finding in pipeline_findings(choice.recipe(self.base)))
            for choice in choices
        ]


def admits(space: Space, choice: Choice) -> bool:
    """Return whether `check` accepts the recipe with a choice for so many ranks."""
    try:
        found = load_changed(space.resolved, choice.settings(space.resolved))
        recipe = with_format_of(found.recipe, space.device)
        plan = BatchPlan.from_recipe(recipe, space.world_size, "--gpus")
        check_micro_batches(recipe, plan)
        deepspeed_config(recipe, plan, largest_weight=space.network.largest_weight)
    except RecipeError:
        return False
    return True
