"""The work of one rank of one layout: the same few steps as in every other layout, and a record of
the results.

Four short trainings of the recipe's model, each with its own engine:

1. One SGD step, at the recipe's ZeRO stage. SGD, because Adam divides by its own second moment and
   hides a gradient that is scaled twice or not at all.
2. Some steps of the recipe's own optimizer.
3. One SGD step in float64 at ZeRO-0, without clipping and decay, so that the update is the
   gradient: DeepSpeed's ZeRO would keep fp32 master weights. A difference from rounding becomes 10⁹
   times smaller, a mistake stays.
4. The steps of 2 in float64, also at ZeRO-0.

Shape letters: G sequences of a step, S sequence length, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.documents import Documents
from parallel.fusable import FUSING
from parallel.gather import logical_tensors
from parallel.loss import IGNORE
from parallel.mesh import Mesh
from parallel.params import ShardSpec, initialise
from parallel.rng import stream
from parallel.topology import Layout
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.execution import DTYPES
from trainer.engine.group import joined
from trainer.engine.step_result import StepResult
from trainer.errors import UserError
from trainer.launch.ranks import Place
from trainer.model.config import TransformerConfig
from trainer.recipe import ResolvedRecipe, load
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Optimizer, Recipe, Zero
from trainer.update_rules import rule_of
from trainer.verify.job import GRADIENT, UPDATE, Job, RankResult

# The learning rate of an SGD step, so large that subtracting the update from the weights does not
# round the update. A power of two scales exactly.
SGD_LR = 2.0**20
DOCUMENTS = 3  # packed into each sequence


def run(folder: Path, rank: int) -> None:
    """Do a rank's part of a job, and leave `RankResult` and, on rank 0, the tensors in its
    folder."""
    job = Job.read(folder / "job.json")
    resolved = load(folder / "recipe.json")
    layout = Layout(**job.degrees)
    world = layout.world_size
    place = Place(rank, rank, world, world, "127.0.0.1", job.port, "triaxis verify")
    with joined(place, timedelta(seconds=resolved.recipe.guard.timeout_s)) as group:
        if place.device.type == "cpu":
            # The same in every layout, because threads change the order of sums.
            torch.set_num_threads(1)
        trial = Trial(resolved, Mesh.build(layout, group.timeout), place.device)
        result = trial.measure(job.steps, folder)
        result.write(folder / f"rank-{rank}.json")


@dataclass(frozen=True)
class Trained:
    """A short training: its steps, and on rank 0 the logical tensors before and after."""

    steps: list[StepResult]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    boxes: dict[str, str]


class Trial:
    """The recipe's model in one layout."""

    def __init__(self, resolved: ResolvedRecipe, mesh: Mesh, device: torch.device) -> None:
        self.resolved = resolved
        self.mesh = mesh
        self.device = device
        self.network: TransformerConfig = resolved.network(vocab_size=None)
        self.plan = BatchPlan.from_recipe(resolved.recipe, mesh.layout.world_size, "triaxis verify")

    def measure(self, own_steps: int, folder: Path) -> RankResult:
        recipe = self.resolved.recipe
        sgd = self.train(with_sgd(recipe), 1, SGD_LR)
        own = self.train(recipe, own_steps, recipe.optimizer.lr)
        gradient = self.train(gradient_only(in_float64(recipe)), 1, SGD_LR)
        double = [*gradient.steps, *self.own_steps_in_float64(own_steps)]
        if self.mesh.rank == 0:
            save_file(_updates(sgd), folder / UPDATE)
            save_file(_updates(gradient), folder / GRADIENT)
        steps = [*sgd.steps, *own.steps]
        return RankResult(
            losses=[step.loss for step in steps],
            norms=[step.grad_norm for step in steps],
            targets=[step.num_targets for step in steps],
            losses64=[step.loss for step in double],
            norms64=[step.grad_norm for step in double],
            boxes=own.boxes,
            initial={name: _digest(tensor) for name, tensor in sgd.before.items()},
        )

    def own_steps_in_float64(self, steps: int) -> list[StepResult]:
        """Train steps of the recipe's optimizer in float64. None where its class has no float64."""
        recipe = self.resolved.recipe
        if not rule_of(recipe.optimizer).in_float64:
            return []
        return self.train(in_float64(recipe), steps, recipe.optimizer.lr).steps

    def train(self, recipe: Recipe, steps: int, lr: float) -> Trained:
        with self.engine(recipe) as engine:
            before = logical_tensors(engine.gathered_tensors())
            results = [engine.step(self.micro_batches(step), step=step, lr=lr) for step in range(steps)]
            if FUSING.failure is not None:
                raise UserError(f"train.compile: the compiler failed: {FUSING.failure}")
            after = logical_tensors(engine.gathered_tensors())
            return Trained(results, before, after, boxes(engine.local_tensors()))

    @contextmanager
    def engine(self, recipe: Recipe) -> Iterator[Engine]:
        engine = Engine(
            recipe,
            self.plan,
            self.network,
            self.mesh,
            self.device,
            deepspeed_config=deepspeed_config(recipe, self.plan, largest_weight=self.network.largest_weight),
            fill=self.fill_in_float64 if DTYPES[recipe.precision.settled] == torch.float64 else self.fill,
        )
        try:
            yield engine
        finally:
            engine.close()

    def fill(self, block: nn.Module) -> None:
        initialise(block, self.resolved.recipe.run.seed)

    def fill_in_float64(self, block: nn.Module) -> None:
        """Set a block's weights to the same values as in fp32."""
        self.fill(block)
        block.double()

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of a step."""
        tokens, labels, documents = self.rows(step)
        plan = self.plan
        first = self.mesh.data.rank * plan.sequences_per_rank
        starts = range(first, first + plan.sequences_per_rank, plan.micro_sequences)
        return [
            MicroBatch(tokens[start:stop], Documents(documents[start:stop]), labels[start:stop])
            for start in starts
            for stop in (start + plan.micro_sequences,)
        ]

    def rows(self, step: int) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
        """Return random tokens and labels [G, S] and the documents of a step, the same in every
        layout.

        Row r has a share r / G of its labels masked, so that taking a mean of micro-batch means
        would show.
        """
        G, S, V = self.plan.global_sequences, self.plan.row_tokens, self.network.vocab_size
        generator = stream(torch.device("cpu"), self.resolved.recipe.run.seed, "verify", step)
        tokens = torch.randint(0, V, (G, S + 1), generator=generator)
        masked = torch.rand(G, S, generator=generator) < torch.arange(G)[:, None] / G
        labels = (tokens[:, 1:] % (len(self.network.classes) or V)).masked_fill(masked, IGNORE)
        data = self.resolved.recipe.data
        parts = data.row_tokens // data.seq_len
        labels[:, : S - S // parts] = IGNORE  # a translation learns only its second half
        drawn = [[_lengths(S // parts, generator) for _ in range(parts)] for _ in range(G)]
        documents = tuple(tuple(n for part in row for n in part) for row in drawn) if data.isolate_documents else ((S,),) * G
        return tokens[:, :-1].contiguous(), labels, documents


def _lengths(num_tokens: int, generator: torch.Generator) -> list[int]:
    """Return the lengths of the documents in `num_tokens` tokens."""
    cuts = sorted((torch.randperm(num_tokens - 1, generator=generator)[: DOCUMENTS - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, num_tokens], strict=True)]


def with_sgd(recipe: Recipe) -> Recipe:
    """Return the recipe with plain SGD; decay, clipping and ZeRO stay."""
    return recipe.model_copy(
        update={"optimizer": Optimizer(name="sgd", lr=SGD_LR, momentum=0.0, weight_decay=recipe.optimizer.weight_decay)}
    )


def in_float64(recipe: Recipe) -> Recipe:
    """Return the recipe in a format that no recipe may ask for, at ZeRO-0, where the parameters are
    the master weights."""
    precision = recipe.precision.model_copy(update={"dtype": "fp64"})
    return recipe.model_copy(update={"precision": precision, "zero": Zero(stage=0)})


def gradient_only(recipe: Recipe) -> Recipe:
    """Return the recipe with SGD whose update is the gradient, before anything is done to it."""
    return recipe.model_copy(
        update={
            "optimizer": Optimizer(name="sgd", lr=SGD_LR, momentum=0.0, weight_decay=0.0),
            "train": recipe.train.model_copy(update={"clip_norm": 0.0}),
        }
    )


def boxes(parameters: Iterable[tuple[ShardSpec, Tensor]]) -> dict[str, str]:
    """Return digests of the boxes that this rank holds, by their tensor's name and place in it."""
    return {
        f"{piece.name} {json.dumps([piece.start, piece.size])}": _digest(piece.in_parameter(parameter))
        for spec, parameter in parameters
        for piece in spec.pieces
    }


def _updates(trained: Trained) -> dict[str, Tensor]:
    return {name: before - trained.after[name] for name, before in trained.before.items()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
