"""The execution of a step's micro-batches on one rank: one stage on each in turn, or several stages
in the order of a pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.deferred import WeightGradients
from parallel.mesh import Group, Mesh
from parallel.params import Role, ShardSpec, owned_specs
from parallel.schedule_table import ScheduleTable
from parallel.tensor import TensorParallel
from parallel.vocabulary import vocabulary_shard
from trainer.data.loader import MicroBatch
from trainer.model.auto_network import AutoNetwork
from trainer.model.auto_stage import AutoStage
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.model.heads import Output
from trainer.model.measures import Measures
from trainer.model.network import Network
from trainer.model.objective import objective_of
from trainer.model.position_tables import PositionTables, ranks_of_tables
from trainer.model.transformer import Stage
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import schedule_table
from trainer.recipe.stages import stages_of
from trainer.schema import Recipe
from trainer.stopwatch import Stopwatch
from trainer.tuning.adapt import adaptation

# A recipe cannot ask for fp64: `verify` uses it, at stage 0, to tell rounding from mistakes.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class BuildStage(Protocol):
    """A function that builds a stage; it has everything that is the same for all stages."""

    def __call__(self, blocks: Sequence[Block], *, tp: TensorParallel, **ties: Any) -> Stage: ...


class Execution(Protocol):
    """The part of the model on this rank, and the way it runs.

    `module` is given to DeepSpeed. Losses and statistics are sums over the targets of this
    data-parallel rank, float64, the loss first, the same on all ranks that share them.
    `reads_tokens`: this rank needs tokens or labels, and not only the lengths of the documents.
    """

    reads_tokens: bool

    @property
    def module(self) -> nn.Module: ...

    @property
    def constants(self) -> Sequence[tuple[ShardSpec, Tensor]]:
        """Return the tensors that are saved like weights and never trained."""

    def require_causal(self, device: torch.device) -> None:
        """Raise RecipeError for a model in which a token sees the next one, as far as a trial run
        shows."""

    def settle_lengths(self, device: torch.device, seq_len: int, *, may_call_apart: bool) -> list[str]:
        """Return remarks on how documents of different lengths are computed: see
        `AutoStage.settle_lengths`."""

    def attach(self, engine: Any) -> None:
        """Take the DeepSpeed engine, which is built after this."""

    def step(self, batches: Sequence[MicroBatch], *, factor: Tensor | float, scale: float) -> Tensor:
        """Run forward and backward of all micro-batches, and return their sums, [num_step_sums].
        The gradients are those of loss · factor, times the loss scale."""

    def sums(self, batch: MicroBatch) -> Tensor:
        """Return the task's statistics of a micro-batch, [num_sums]. No gradients."""

    def scores(self, batch: MicroBatch) -> Tensor:
        """Return the scores of each document, as `document_scores` does. No gradients."""

    def logits(self, batch: MicroBatch) -> Tensor:
        """Return this tensor rank's logits of the first row, [S, V/p]. No gradients."""


@singledispatch
def make_execution(
    network: Network,
    recipe: Recipe,
    plan: BatchPlan,
    mesh: Mesh,
    device: torch.device,
    *,
    measures: Measures,
    watch: Stopwatch,
    fill: Callable[[nn.Module], None],
    partition: Callable[[nn.Module], None] = lambda block: None,
) -> Execution:
    """Return this rank's part of the model, built, with the way it runs. `fill` and `partition`:
    see `Stage`."""
    raise TypeError(type(network))


@make_execution.register
def _(
    network: AutoNetwork,
    recipe: Recipe,
    plan: BatchPlan,
    mesh: Mesh,
    device: torch.device,
    *,
    measures: Measures,
    watch: Stopwatch,
    fill: Callable[[nn.Module], None],
    partition: Callable[[nn.Module], None] = lambda block: None,
) -> Execution:
    dtype, recompute = DTYPES[recipe.precision.settled], recipe.train.recompute
    return OneStage(AutoStage(network, dtype=dtype, recompute=recompute, device=device, fill=fill, partition=partition), watch)


@make_execution.register
def _(
    network: TransformerConfig,
    recipe: Recipe,
    plan: BatchPlan,
    mesh: Mesh,
    device: torch.device,
    *,
    measures: Measures,
    watch: Stopwatch,
    fill: Callable[[nn.Module], None],
    partition: Callable[[nn.Module], None] = lambda block: None,
) -> Execution:
    dtype = DTYPES[recipe.precision.settled]
    build = partial(
        Stage,
        network,
        dtype=dtype,
        recompute=recipe.train.recompute,
        device=device,
        fill=fill,
        adapt=adaptation(recipe.tuning, network),
        partition=partition,
        objective=objective_of(recipe),
    )
    tp = TensorParallel(mesh.tp, sequence=recipe.parallel.divides_tokens, overlap=recipe.parallel.overlap)
    if recipe.parallel.pipeline == 1:
        return OneStage(build(blocks_of(network), tp=tp), watch)
    return InPipeline(
        build,
        stages_of(recipe, network),
        schedule_table(recipe, plan),
        plan=plan,
        config=network,
        dtype=dtype,
        mesh=mesh,
        tp=tp,
        device=device,
        watch=watch,
        measures=measures,
    )


class OneStage:
    """The whole model on each data-parallel rank: DeepSpeed's own forward and backward."""

    reads_tokens = True

    def __init__(self, module: Stage | AutoStage, watch: Stopwatch) -> None:
        self.module = module
        self.constants = module.constants
        self.require_causal = module.require_causal
        self.settle_lengths = module.settle_lengths
        self._watch = watch

    def attach(self, engine: Any) -> None:
        self._engine = engine

    def step(self, batches: Sequence[MicroBatch], *, factor: Tensor | float, scale: float) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64, device=batches[0].tokens_BS.device)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            with self._watch("forward"):
                sums = self._engine(batch.tokens_BS, batch=batch).reshape(-1)
            with self._watch("backward"):
                total = total + sums.detach().double()
                self._backward(sums[0] * factor, scale)
        return total

    def sums(self, batch: MicroBatch) -> Tensor:
        sums: Tensor = self.module(batch.tokens_BS, batch=batch, output="sums")
        return sums

    def scores(self, batch: MicroBatch) -> Tensor:
        scores: Tensor = self.module(batch.tokens_BS, batch=batch, output="scores")
        return scores

    def logits(self, batch: MicroBatch) -> Tensor:
        logits: Tensor = self.module(batch.tokens_BS, batch=batch, output="logits")[0]
        return logits

    def _backward(self, loss: Tensor, scale: float) -> None:
        # At stage 0 DeepSpeed trains in fp32 and scales nothing; at stages 1 to 3 it multiplies by
        # the scale that we gave it.
        own_scale = scale if self._engine.zero_optimization_stage() == 0 else 1.0
        self._engine.backward(loss * own_scale, scale_wrt_gas=False)


class InPipeline:
    """A rank's stages of a pipeline, run by torch's runtime under DeepSpeed's optimizer."""

    constants = ()

    def __init__(
        self,
        build: BuildStage,
        stages: Sequence[Sequence[Block]],
        table: ScheduleTable,
        *,
        plan: BatchPlan,
        config: TransformerConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        tp: TensorParallel,
        device: torch.device,
        watch: Stopwatch,
        measures: Measures,
    ) -> None:
        # torch's runtime of pipelines takes 1.4 s to import: only where there is one
        from parallel.pipeline import Pipeline
        from trainer.engine.zero_pipeline import ZeroInPipeline

        self._mesh, self._tp, self._dtype, self._watch = mesh, tp, dtype, watch
        self._measures = measures
        self._hidden_size = config.hidden_size
        self._vocabulary_rows = vocabulary_shard(config.vocab_size, tp.group)[1]
        mine = table.stages(mesh.pp.rank)
        self.reads_tokens = bool({0, table.num_stages - 1} & set(mine))
        deferred = {index: WeightGradients() for index in mine} if table.splits_backward else {}
        last = table.num_stages - 1
        # If one rank has the first and the last stage, the head uses the embedding's own weight,
        # which then takes part in two stages' backwards.
        tied_over = mesh.ends if table.rank_of_stage[0] != table.rank_of_stage[last] else Group.alone()
        tables = PositionTables(ranks_of_tables(config, stages, table.rank_of_stage, mesh))
        built: dict[int, Stage] = {}
        for index in mine:
            first = built.get(0)
            built[index] = build(
                stages[index],
                tp=replace(tp, deferred=deferred.get(index)),
                tied_to=first.embedding.tokens if first is not None and first.embedding is not None else None,
                tied_over=tied_over if index in (0, last) else None,
                tables=tables,
            )
        self.module = nn.ModuleDict({str(index): stage for index, stage in built.items()})
        self._zero = ZeroInPipeline(self.module, watch)
        self._pipeline = Pipeline(
            built,
            table,
            group=mesh.pp,
            device=device,
            tokens=torch.empty((plan.micro_sequences, plan.row_tokens), dtype=torch.int64, device="meta"),
            hidden=self._hidden(plan.micro_sequences * plan.row_tokens),
            num_sums=measures.num_step_sums,
            around=self._zero.around,
            deferred=deferred,
            leaves_weights=any(
                p.requires_grad and spec.role is Role.MATRIX and not spec.added for _, p, spec in owned_specs(self.module)
            ),
        )

    def attach(self, engine: Any) -> None:
        self._zero.attach(engine)

    def require_causal(self, device: torch.device) -> None:
        """Do nothing: the config says which tokens a token attends to."""

    def settle_lengths(self, device: torch.device, seq_len: int, *, may_call_apart: bool) -> list[str]:
        return []

    def step(self, batches: Sequence[MicroBatch], *, factor: Tensor | float, scale: float) -> Tensor:
        self._zero.start()
        with self._watch("forward"):
            tokens_BS = [batch.tokens_BS for batch in batches]
            sums = self._pipeline.step(tokens_BS, [{"batch": self._own(batch)} for batch in batches], scale=factor * scale)
        self._zero.finish(len(batches))
        return all_reduce(sums, self._mesh.pp)  # 0 on all ranks but the one with the last stage

    def sums(self, batch: MicroBatch) -> Tensor:
        return self._of_last_stage(batch, (self._measures.num_sums,), output="sums")

    def scores(self, batch: MicroBatch) -> Tensor:
        return self._of_last_stage(batch, (2, sum(map(len, batch.documents.lengths))), output="scores")

    def logits(self, batch: MicroBatch) -> Tensor:
        rows, seq_len = batch.tokens_BS.shape
        logits_BSV = self._pipeline.forward(batch.tokens_BS, {"batch": batch, "output": "logits"}, self._hidden(rows * seq_len))
        shape = (seq_len, self._vocabulary_rows)
        own = torch.empty(shape, dtype=self._dtype, device=batch.tokens_BS.device) if logits_BSV is None else logits_BSV[0]
        return self._pipeline.broadcast_from_last(own)

    def _of_last_stage(self, batch: MicroBatch, shape: tuple[int, ...], *, output: Output) -> Tensor:
        """Return what the last stage computes, float64 of the given shape, on all ranks of the
        pipeline."""
        hidden = self._hidden(batch.tokens_BS.numel())
        given = self._pipeline.forward(batch.tokens_BS, {"batch": self._own(batch), "output": output}, hidden)
        nothing = torch.zeros(shape, dtype=torch.float64, device=batch.tokens_BS.device)
        return all_reduce(nothing if given is None else given, self._mesh.pp)

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """Return what this rank's stages need of a micro-batch. Only the last stage needs the
        labels and the values that they are compared with."""
        return batch if self._pipeline.has_last else batch.without_labels()

    def _hidden(self, num_tokens: int) -> Tensor:
        tokens = self._tp.tokens(num_tokens)
        return torch.empty((tokens.stop - tokens.start, self._hidden_size), dtype=self._dtype, device="meta")
