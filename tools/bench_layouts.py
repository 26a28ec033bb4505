"""Step times of two processes: every ZeRO stage, offload, tensor and pipeline parallelism beside
torch's DDP and FSDP2, and DeepSpeed's PipelineEngine.

    python tools/bench_layouts.py [--quick] [--json FILE] [--nvme-path DIR]

All contenders train the same Llama from the same weights on the same batches; torch's two wrap our
own `Stage`, so only what is around the model differs. Data-parallel contenders have a micro-batch
on each rank; tensor- and pipeline-parallel ones have both micro-batches together, a pipeline in 8
micro-batches. DeepSpeed's pipeline is made of our own blocks. Losses and gradient norms of the
first two steps must agree before anything is timed.

Each contender is a pair of gloo processes of its own with one thread each, because DeepSpeed keeps
state per process. Only one pair works at a time: the others wait for a message on their pipes. In
each repeat every contender takes one step, in an order drawn anew, and its time is paired with
DDP's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench import (
    CLIP_NORM,
    LR,
    SEED,
    TINY,
    TOLERANCE,
    WARM_UP,
    Numbers,
    Shape,
    Spread,
    command_line,
    interleaved,
    make_console,
    make_engine,
    our_step,
    require_agreement,
    shape_of,
    write_json,
)
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parallel.documents import Documents
from parallel.mesh import Mesh
from parallel.params import initialise, owned_specs
from parallel.tensor import TensorParallel
from parallel.topology import Layout
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.engine.execution import DTYPES
from trainer.engine.optimizers import make_optimizer
from trainer.errors import UserError
from trainer.model.blocks import blocks_of
from trainer.model.transformer import Stage
from trainer.schema import Dtype, Recipe

PAIR = 2
CPU = torch.device("cpu")
SMALL = Shape(layers=4, hidden=256, ffn=704, heads=4, seq_len=256)
REFERENCE = "torch DDP"

ON_CPU, ON_NVME = {"device": "cpu"}, {"device": "nvme"}
ZERO: Mapping[str, Mapping[str, Any]] = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2, optimizer on CPU": {"stage": 2, "offload_optimizer": ON_CPU},
    "ZeRO-3, all on CPU": {"stage": 3, "offload_optimizer": ON_CPU, "offload_param": ON_CPU},
    "ZeRO-3, all on NVMe": {"stage": 3, "offload_optimizer": ON_NVME, "offload_param": ON_NVME},
}
TENSOR: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"sequence_parallel": True, "overlap": True},
    "tensor, no overlap": {"sequence_parallel": True, "overlap": False},
    "tensor, no sequence": {"sequence_parallel": False, "overlap": True},
    "tensor, neither": {"sequence_parallel": False, "overlap": False},
}
PIPELINE: Mapping[str, Mapping[str, Any]] = {
    "pipeline 1f1b": {"schedule": "1f1b"},
    "pipeline interleaved": {"schedule": "interleaved_1f1b", "virtual_stages": 2},
    "pipeline zero-bubble": {"schedule": "interleaved_zero_bubble"},
    "pipeline zbv": {"schedule": "zbv", "virtual_stages": 2},
}
DEEPSPEED_PIPELINE = "DeepSpeed PipelineEngine"
MICRO_BATCHES = 8
CONTENDERS = (REFERENCE, "torch FSDP2", *ZERO, *TENSOR, *PIPELINE, DEEPSPEED_PIPELINE)


@dataclass(frozen=True)
class Figure:
    """A contender in one format."""

    contender: str
    dtype: Dtype
    step_s: float  # the slower rank's, median
    tokens_per_s: float  # of both ranks
    speed: Spread  # DDP's step time / this one's, paired
    bytes_on_disk: int


def whole_model(shape: Shape, dtype: Dtype) -> Stage:
    """Return our model as one undivided module, for the peers to divide."""
    network = shape.network()
    return Stage(
        network,
        blocks_of(network),
        dtype=DTYPES[dtype],
        recompute="none",
        tp=TensorParallel.alone(),
        device=CPU,
        fill=lambda block: initialise(block, seed=SEED),
    )


class TorchLoop:
    """A loop over our `Stage` under DDP or FSDP2, with the optimizer, clipping and normalisation of
    our recipe.

    In bf16 both hold fp32 weights, which are cast for use, and reduce gradients in fp32, as our
    engine does.
    """

    def __init__(self, kind: str, shape: Shape, dtype: Dtype) -> None:
        stage = whole_model(shape, dtype)
        spec_of = {name: spec for name, _, spec in owned_specs(stage)}
        self.model: nn.Module = stage
        if kind == REFERENCE:
            self.model = nn.parallel.DistributedDataParallel(stage)
        else:
            policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
            for layer in stage.layers.values():
                fully_shard(layer, mp_policy=policy)
            fully_shard(stage, mp_policy=policy)
        # FSDP2 replaces the parameters, so they are found by name.
        self.parameters = [(parameter, spec_of[name]) for name, parameter in stage.named_parameters()]
        self.optimizer = make_optimizer(Recipe.model_validate({"optimizer": {"lr": LR}}), self.parameters, CPU)

    def step(self, batch: MicroBatch) -> Numbers:
        loss_sum = self.model(batch.tokens_BS, batch=batch)
        counts = torch.tensor([batch.num_targets, 0.0], dtype=torch.float64)
        counts[1] = loss_sum.detach()
        dist.all_reduce(counts)
        num_targets, total = counts.tolist()
        (loss_sum * (PAIR / num_targets)).backward()  # DDP and FSDP2 average over the ranks
        norm = nn.utils.clip_grad_norm_([parameter for parameter, _ in self.parameters], CLIP_NORM)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / num_targets, float(norm)


def make_step(contender: str, shape: Shape, dtype: Dtype, disk: Path) -> Callable[[], Numbers]:
    """Return a function that does one step of a contender on this rank."""
    if contender in TENSOR:
        both = replace(shape, micro_sequences=PAIR * shape.micro_sequences)
        parallel = {"tensor": PAIR, **TENSOR[contender]}
        engine = make_engine(both, Mesh.build(Layout(tp=PAIR)), CPU, dtype=dtype, zero={}, parallel=parallel)
        return partial(our_step, engine, joined(shape.batch(SEED + rank, documents=1) for rank in range(PAIR)))
    if contender in PIPELINE or contender == DEEPSPEED_PIPELINE:
        rows = [row for rank in range(PAIR) for row in rows_of(shape.batch(SEED + rank, documents=1))]
        size = len(rows) // MICRO_BATCHES
        batches = [joined(rows[start : start + size]) for start in range(0, len(rows), size)]
        if contender == DEEPSPEED_PIPELINE:
            return partial(DeepSpeedPipeline(shape, dtype, size).step, batches)
        both = replace(shape, micro_sequences=len(rows))
        parallel = {"pipeline": PAIR, **PIPELINE[contender]}
        mesh = Mesh.build(Layout(pp=PAIR))
        engine = make_engine(both, mesh, CPU, dtype=dtype, zero={}, parallel=parallel, micro_batches=MICRO_BATCHES)
        return partial(our_pipeline_step, engine, batches)
    batch = shape.batch(SEED + dist.get_rank(), documents=1)
    if contender not in ZERO:
        return partial(TorchLoop(contender, shape, dtype).step, batch)
    zero = dict(ZERO[contender])
    for block in ("offload_optimizer", "offload_param"):
        if zero.get(block) == ON_NVME:
            zero[block] = {**ON_NVME, "nvme_path": str(disk)}
    engine = make_engine(shape, Mesh.build(Layout(dp=PAIR)), CPU, dtype=dtype, zero=zero)
    return partial(our_step, engine, batch)


def our_pipeline_step(engine: Engine, batches: Sequence[MicroBatch]) -> Numbers:
    result = engine.step(batches, step=0, lr=LR)
    return result.loss, result.grad_norm


class DeepSpeedPipeline:
    """The same blocks, weights and update in DeepSpeed's own pipeline, which runs 1F1B."""

    def __init__(self, shape: Shape, dtype: Dtype, micro_sequences: int) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        stage = whole_model(shape, dtype)
        documents = Documents.whole_rows(micro_sequences, shape.seq_len)
        blocks = [
            _InPipeline(stage, stage.embedding, documents),
            *(_InPipeline(stage, layer, documents) for layer in stage.layers.values()),
            _InPipeline(stage, stage.head.norm, documents),
        ]
        blocks[-1].output = stage.head.output
        self.num_targets = 1
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)

        def loss(h_ND: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
            # DeepSpeed averages over the micro-batches.
            return stage.head.output.loss_sum(h_ND, labels_BS.flatten()) * (MICRO_BATCHES / self.num_targets)

        model = PipelineModule(blocks, num_stages=PAIR, loss_fn=loss, partition_method="uniform")
        specs = {id(parameter): spec for _, parameter, spec in owned_specs(stage)}
        parameters = [(parameter, specs[id(parameter)]) for parameter in model.parameters()]
        optimizer = make_optimizer(Recipe.model_validate({"optimizer": {"lr": LR}}), parameters, CPU)
        config = {
            "train_micro_batch_size_per_gpu": micro_sequences,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": CLIP_NORM,
            "steps_per_print": 1_000_000,
        }
        for parameter, _ in parameters:
            parameter.model_parallel = True
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.parameters = [parameter for parameter, _ in parameters]
        self.engine.clip_fp32_gradients = self.clip  # DeepSpeed's keeps the norm to itself

    def clip(self) -> None:
        square = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters]).square()
        dist.all_reduce(square)
        self.norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, CLIP_NORM, self.norm)

    def step(self, batches: Sequence[MicroBatch]) -> Numbers:
        self.num_targets = sum(batch.num_targets for batch in batches)
        loss = self.engine.train_batch(iter([(batch.tokens_BS, batch.labels_BS) for batch in batches]))
        return float(loss), float(self.norm)


class _InPipeline(nn.Module):
    """A block that takes one tensor, as DeepSpeed's pipeline passes one; its documents are whole
    rows."""

    def __init__(self, stage: Stage, block: nn.Module, documents: Documents) -> None:
        super().__init__()
        self.block = block
        # In a tuple, so the stage is no child module.
        self._stage, self._documents = (stage,), documents

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (stage,) = self._stage
        if self.block is stage.embedding:
            return self.block(x, self._documents, None)
        if stage.head is not None and self.block is stage.head.norm:
            return self.block(x)
        return self.block(x, self._documents, stage._rotation(self._documents, x.device), None)


def rows_of(batch: MicroBatch) -> list[MicroBatch]:
    rows = range(len(batch.documents.lengths))
    return [
        MicroBatch(batch.tokens_BS[r : r + 1], Documents((batch.documents.lengths[r],)), batch.targets_BS[r : r + 1])
        for r in rows
    ]


def joined(batches: Iterable[MicroBatch]) -> MicroBatch:
    """Return one micro-batch with the rows of several."""
    tokens, labels, documents = zip(*((b.tokens_BS, b.targets_BS, b.documents.lengths) for b in batches), strict=True)
    return MicroBatch(torch.cat(tokens), Documents(tuple(itertools.chain(*documents))), torch.cat(labels))


# ------------------------------------------------------------------------------------ one contender
# One contender is two processes that take a step when they are told to.


@dataclass(frozen=True)
class Answer:
    """The message of a rank after a step; `failure` is its traceback."""

    numbers: Numbers = (0.0, 0.0)
    step_s: float = 0.0
    failure: str | None = None


def serve(rank: int, contender: str, shape: Shape, dtype: Dtype, folder: Path, pipe: Connection) -> None:
    """Run a rank: join, build, then take one step and send one answer per message, until the pipe
    closes."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # torch's FSDP2 and DeepSpeed call collectives that torch has renamed.
    warnings.simplefilter("ignore", FutureWarning)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PAIR, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        store = dist.FileStore(str(folder / "rendezvous"), PAIR)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PAIR)
        step = make_step(contender, shape, dtype, folder)
        pipe.send(Answer())
        while pipe.recv():
            dist.barrier()
            start = time.perf_counter()
            numbers = step()
            pipe.send(Answer(numbers, time.perf_counter() - start))
    except EOFError:
        pass
    except BaseException:
        pipe.send(Answer(failure=traceback.format_exc()))


class PairFailed(UserError):
    """The error that a contender could not be built or stepped."""


class Pair:
    """The two processes of one contender, seen from the process that times them."""

    def __init__(self, contender: str, shape: Shape, dtype: Dtype, folder: Path) -> None:
        self.contender, self.folder = contender, folder
        folder.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.engine.engine", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"])
        self.pipes, self.processes = [], []
        for rank in range(PAIR):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, contender, shape, dtype, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def answers(self) -> list[Answer]:
        """Return the answers of both ranks. PairFailed with the tracebacks if one has failed."""
        collected = []
        for rank, pipe in enumerate(self.pipes):
            try:
                collected.append(pipe.recv())
            except EOFError:
                collected.append(Answer(failure=f"rank {rank} died without a word"))
            if collected[-1].failure:
                raise PairFailed(f"{self.contender}, rank {rank}:", *str(collected[-1].failure).splitlines())
        return collected

    def step(self) -> tuple[Numbers, float]:
        """Take one step on both ranks, and return its numbers and the slower rank's seconds."""
        for pipe in self.pipes:
            pipe.send(True)
        answers = self.answers()
        return answers[0].numbers, max(answer.step_s for answer in answers)

    def step_s(self) -> float:
        return self.step()[1]

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*.swp"))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def open_pairs(names: Sequence[str], shape: Shape, dtype: Dtype, disk: Path | None) -> Iterator[dict[str, Pair]]:
    """Open all contenders of one format, built one after another."""
    pairs: dict[str, Pair] = {}
    with tempfile.TemporaryDirectory(prefix="bench-layouts-", dir=disk) as folder:
        try:
            for index, name in enumerate(names):
                pairs[name] = Pair(name, shape, dtype, Path(folder) / str(index))
                pairs[name].answers()
            yield pairs
        finally:
            for pair in pairs.values():
                pair.close()


def measure(names: Sequence[str], shape: Shape, dtype: Dtype, disk: Path | None, *, repeats: int) -> list[Figure]:
    """Measure all contenders in one format: check that they agree, then time them in turn."""
    with open_pairs(names, shape, dtype, disk) as pairs:
        numbers = {name: [pair.step()[0] for _ in range(WARM_UP)] for name, pair in pairs.items()}
        require_agreement(dtype, numbers, TOLERANCE[dtype])
        samples = interleaved({name: pair.step_s for name, pair in pairs.items()}, repeats)
        on_disk = {name: pair.bytes_on_disk() for name, pair in pairs.items()}
    return [
        Figure(
            contender=name,
            dtype=dtype,
            step_s=statistics.median(seconds),
            tokens_per_s=PAIR * shape.tokens / statistics.median(seconds),
            speed=Spread.of_ratios(samples[REFERENCE], seconds),
            bytes_on_disk=on_disk[name],
        )
        for name, seconds in samples.items()
    ]


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title)
    table.add_column("format")
    table.add_column("contender")
    for heading in ("step ms", "tokens/s", f"speed / {REFERENCE}\nmedian (min–max)", "MiB on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(
            figure.dtype,
            figure.contender,
            f"{figure.step_s * 1e3:.0f}",
            f"{figure.tokens_per_s:,.0f}",
            str(figure.speed),
            f"{figure.bytes_on_disk / 2**20:.0f}" if "NVMe" in figure.contender else "",
        )
    return table


def main(arguments: Sequence[str]) -> int:
    parser = command_line(arguments, __doc__, SMALL, replace(TINY, seq_len=32, layers=4, micro_sequences=4))
    parser.add_argument("--nvme-path", type=Path, metavar="DIR", help="folder to swap in; default: a temporary folder")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help=f"{REFERENCE} always runs; default: all"
    )
    options = parser.parse_args(arguments)
    if options.nvme_path is not None and not options.nvme_path.is_dir():
        parser.error(f"--nvme-path {options.nvme_path} is not a folder: make it first")
    names = [REFERENCE, *(name for name in options.contenders if name != REFERENCE)]
    shape, console, figures = shape_of(options), make_console(), []
    torch.set_num_threads(1)  # as in the ranks, so that the figures report it
    try:
        for dtype in options.dtypes:
            with console.status(f"{dtype}: {len(names)} contenders, {PAIR} processes each"):
                figures += measure(names, shape, dtype, options.nvme_path, repeats=options.repeats)
    except UserError as error:
        console.print("\n".join(error.lines), style="red", markup=False)
        return error.exit_code
    console.print(table_of(figures, f"{PAIR} processes, 1 thread each; Llama: {shape} per rank; {options.repeats} repeats"))
    write_json(options.json, "layouts", shape, figures)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main(sys.argv[1:]))
