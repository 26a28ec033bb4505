"""Step times and memory of two processes: every ZeRO stage, offload, tensor and pipeline
parallelism beside the field's own.

    python tools/bench_layouts.py [--quick] [--json FILE] [--layouts NAME …] [--nvme-path DIR]

The peers train transformers' Llama: torch's DDP, FSDP2, DTensor and pipelining (`torch_peers`), and
transformers' Trainer on DeepSpeed, whose own loop is timed from within (`deepspeed_peers`).
DeepSpeed's PipelineEngine has our blocks: it takes no model of transformers. All start from the
same weights and train on the same batches. Data-parallel contenders have a micro-batch on each
rank; tensor- and pipeline-parallel ones have both micro-batches together, a pipeline in 8
micro-batches. Losses and gradient norms of the first two steps must agree before anything is timed.

Each contender is a pair of gloo processes of its own with one thread each. The contenders of a
layout take turns, in an order drawn anew in each repeat, and their steps are paired with
Triaxis's. Memory is the most that a step had resident on a rank beyond its imports.

A step that offloads is held against the same layout without offload in the same repeat, and the
bytes that it moves (`trainer.planner.traffic`) at the rates that a copy in memory and a file of the
swap folder have here, as long as the system keeps it in memory.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Loop, Opener, Place, Ranks, first_steps, opened, step_by_step
from contest import (
    PAIR,
    SEED,
    TINY,
    TOLERANCE,
    WARM_UP,
    Shape,
    Spread,
    command_line,
    formats_of,
    interleaved,
    make_console,
    make_engine,
    our_step,
    recipe_of,
    require_agreement,
    shape_of,
    write_json,
)
from deepspeed_peers import pipeline_engine_loop, trainer_loop
from rich.table import Table
from torch_peers import data_parallel_loop, ddp, fsdp2, pipeline_loop, tensor_loop

from parallel.documents import Documents
from parallel.mesh import Mesh
from parallel.topology import Layout
from trainer.data.loader import MicroBatch
from trainer.doctor.disk_speed import disk_speed
from trainer.doctor.speed import copy_rate
from trainer.errors import UserError
from trainer.planner.traffic import Medium, Traffic
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Dtype

CPU = torch.device("cpu")
SMALL = Shape(layers=4, hidden=256, ffn=704, heads=4, seq_len=256)
OURS, RESIDENT = "Triaxis", "Triaxis without offload"
MICRO_BATCHES = 8  # of a pipeline
SHARE = 0.85  # of the bound that an offloading step shall reach
COPIED = 64 << 20  # bytes of the copy whose rate is measured

Zero = Mapping[str, Any]
Maker = Callable[[Shape, Dtype, Path], Loop]


def our_loop(
    shape: Shape, dtype: Dtype, folder: Path, *, layout: Layout, zero: Zero | None = None, parallel: Zero | None = None
) -> Loop:
    """Return the loop of our engine in a layout."""
    batches = batches_of(shape, layout)
    rows = sum(len(batch.documents.lengths) for batch in batches)
    engine = make_engine(
        replace(shape, micro_sequences=rows),
        Mesh.build(layout),
        CPU,
        dtype=dtype,
        zero=swapping_in(folder, zero or {}),
        parallel=parallel,
        micro_batches=len(batches),
    )
    return step_by_step(partial(our_step, engine, batches))


def batches_of(shape: Shape, layout: Layout) -> list[MicroBatch]:
    """Return the micro-batches of this rank: its own, or both ranks' together."""
    if layout.dp == PAIR:
        return [shape.batch(SEED + dist.get_rank(), documents=1)]
    batches = [shape.batch(SEED + rank, documents=1) for rank in range(PAIR)]
    if layout.tp == PAIR:
        return [joined(batches)]
    rows = [row for batch in batches for row in rows_of(batch)]
    size = len(rows) // MICRO_BATCHES
    return [joined(rows[start : start + size]) for start in range(0, len(rows), size)]


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


def swapping_in(folder: Path, zero: Zero) -> dict[str, Any]:
    """Return DeepSpeed's block with this folder for whatever is offloaded to NVMe."""
    swaps = {"device": "nvme", "nvme_path": str(folder)}
    return {key: swaps if value == ON_NVME else value for key, value in zero.items()}


def peer_on_deepspeed(shape: Shape, dtype: Dtype, folder: Path, *, zero: Zero) -> Loop:
    return trainer_loop(shape, dtype, folder, zero=swapping_in(folder, zero))


def peer_of_tensors(shape: Shape, dtype: Dtype, folder: Path, *, by_sequence: bool) -> Loop:
    (batch,) = batches_of(shape, Layout(tp=PAIR))
    return tensor_loop(shape, dtype, folder, batch=batch, by_sequence=by_sequence)


def peer_of_stages(shape: Shape, dtype: Dtype, folder: Path, *, loop: Callable[..., Loop]) -> Loop:
    return loop(shape, dtype, folder, batches=batches_of(shape, Layout(pp=PAIR)))


@dataclass(frozen=True)
class Contest:
    """The contenders of a layout, by name; the first is the one that the others are paired with."""

    makers: Mapping[str, Maker]
    offload: Zero = field(default_factory=dict)  # DeepSpeed's block, where something is offloaded

    @property
    def peers(self) -> list[str]:
        return [name for name in self.makers if not name.startswith(OURS)]


def zero_contest(zero: Zero, **peers: Maker) -> Contest:
    ours = partial(our_loop, layout=Layout(dp=PAIR))
    resident = {key: value for key, value in zero.items() if not key.startswith("offload")}
    makers: dict[str, Maker] = {OURS: partial(ours, zero=zero)}
    if zero["stage"] > 0:
        makers["Trainer + DeepSpeed"] = partial(peer_on_deepspeed, zero=zero)
    makers |= peers
    if resident == zero:
        return Contest(makers)
    return Contest({**makers, RESIDENT: partial(ours, zero=resident)}, offload=zero)


def tensor_contest(*, by_sequence: bool) -> Contest:
    keys = {"tensor": PAIR, "sequence_parallel": by_sequence}
    ours = {OURS: True, f"{OURS}, no overlap": False}
    makers: dict[str, Maker] = {
        name: partial(our_loop, layout=Layout(tp=PAIR), parallel={**keys, "overlap": overlap}) for name, overlap in ours.items()
    }
    return Contest({**makers, "DTensor": partial(peer_of_tensors, by_sequence=by_sequence)})


def pipeline_contest() -> Contest:
    schedules: Mapping[str, Mapping[str, Any]] = {
        OURS: {"schedule": "1f1b"},
        f"{OURS}, interleaved": {"schedule": "interleaved_1f1b", "virtual_stages": 2},
        f"{OURS}, zero-bubble": {"schedule": "interleaved_zero_bubble"},
        f"{OURS}, zbv": {"schedule": "zbv", "virtual_stages": 2},
    }
    makers: dict[str, Maker] = {
        name: partial(our_loop, layout=Layout(pp=PAIR), parallel={"pipeline": PAIR, **keys}) for name, keys in schedules.items()
    }
    peers = {"torch pipelining": pipeline_loop, "DeepSpeed PipelineEngine": pipeline_engine_loop}
    return Contest({**makers, **{name: partial(peer_of_stages, loop=loop) for name, loop in peers.items()}})


ON_CPU, ON_NVME = {"device": "cpu"}, {"device": "nvme"}
KEEPS, FREES = (partial(data_parallel_loop, wrap=partial(fsdp2, keeps_weights=keeps)) for keeps in (True, False))
LAYOUTS: Mapping[str, Contest] = {
    "ZeRO-0": zero_contest({"stage": 0}, **{"torch DDP": partial(data_parallel_loop, wrap=ddp)}),
    "ZeRO-1": zero_contest({"stage": 1}),
    "ZeRO-2": zero_contest({"stage": 2}, **{"torch FSDP2": KEEPS}),
    "ZeRO-3": zero_contest({"stage": 3}, **{"torch FSDP2": FREES}),
    "ZeRO-2, optimizer on CPU": zero_contest({"stage": 2, "offload_optimizer": ON_CPU}),
    "ZeRO-3, all on CPU": zero_contest({"stage": 3, "offload_optimizer": ON_CPU, "offload_param": ON_CPU}),
    "ZeRO-3, all on NVMe": zero_contest({"stage": 3, "offload_optimizer": ON_NVME, "offload_param": ON_NVME}),
    "tensor": tensor_contest(by_sequence=True),
    "tensor, no sequence": tensor_contest(by_sequence=False),
    "pipeline": pipeline_contest(),
}


@dataclass(frozen=True)
class Figure:
    """A contender of a layout in one format."""

    layout: str
    dtype: Dtype
    contender: str
    step_s: float  # the slower rank's, median
    tokens_per_s: float  # of both ranks
    ratio: Spread  # its step time over Triaxis's, paired
    peak_bytes: int  # of the rank that takes most
    bytes_on_disk: int
    is_best_peer: bool
    bound: Bound | None


@dataclass(frozen=True)
class Bound:
    """The time of an offloading step if it did nothing but the same without offload, and move."""

    resident_s: float  # the step without offload, median
    moved_bytes: float  # of each rank
    moving_s: float
    ratio: Spread  # the step's time over (step without offload + moving) / 0.85, paired


def measure(layout: str, shape: Shape, dtype: Dtype, disk: Path | None, *, repeats: int) -> list[Figure]:
    """Measure the contenders of one layout in one format: check that they agree, then time them in
    turn."""
    contest, place = LAYOUTS[layout], Place(ranks=PAIR, threads=1, device=CPU)
    openers: dict[str, Opener] = {
        name: partial(Ranks, name, partial(maker, shape, dtype), place) for name, maker in contest.makers.items()
    }
    peaks: dict[str, int] = dict.fromkeys(openers, 0)
    with opened(openers, disk) as pairs:
        require_agreement(f"{layout}, {dtype}", first_steps(pairs, WARM_UP), TOLERANCE[dtype])

        def seconds(name: str) -> float:
            answer = pairs[name].step()
            peaks[name] = max(peaks[name], answer.peak_bytes)
            return answer.step_s

        samples = interleaved({name: partial(seconds, name) for name in pairs}, repeats)
        on_disk = {name: swapped_bytes(pair.folder) for name, pair in pairs.items()}
    best = min(contest.peers, key=lambda name: statistics.median(samples[name]))
    bound = bound_of(contest.offload, shape, dtype, samples, disk) if contest.offload else None
    return [
        Figure(
            layout=layout,
            dtype=dtype,
            contender=name,
            step_s=statistics.median(steps),
            tokens_per_s=PAIR * shape.tokens / statistics.median(steps),
            ratio=Spread.of_ratios(steps, samples[OURS]),
            peak_bytes=peaks[name],
            bytes_on_disk=on_disk[name],
            is_best_peer=name == best,
            bound=bound if name == OURS else None,
        )
        for name, steps in samples.items()
    ]


def swapped_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.swp"))


def bound_of(zero: Zero, shape: Shape, dtype: Dtype, samples: Mapping[str, Sequence[float]], disk: Path | None) -> Bound:
    moved = moved_bytes(zero, shape, dtype)
    moving_s = sum(num_bytes * s_per_byte(medium, disk) for medium, num_bytes in moved.items())
    bounds = [(resident + moving_s) / SHARE for resident in samples[RESIDENT]]
    resident_s = statistics.median(samples[RESIDENT])
    return Bound(resident_s, sum(moved.values()), moving_s, Spread.of_ratios(samples[OURS], bounds))


def moved_bytes(zero: Zero, shape: Shape, dtype: Dtype) -> dict[Medium, float]:
    """Return the bytes that a rank's offload moves in a step."""
    recipe = recipe_of(shape, Layout(dp=PAIR), dtype=dtype, zero=swapping_in(Path("swap"), zero))
    plan = BatchPlan.from_recipe(recipe, PAIR, "the benchmark")
    traffic = Traffic(recipe=recipe, batch=plan, network=shape.network(), layout=Layout(dp=PAIR), per_node=PAIR)
    transfers = [transfer for transfer in traffic.transfers() if transfer.medium in (Medium.HOST, Medium.NVME)]
    return {m: sum(t.num_bytes for t in transfers if t.medium is m) for m in {t.medium for t in transfers}}


@cache
def s_per_byte(medium: Medium, disk: Path | None) -> float:
    """Return the seconds of moving a byte: copied in memory, or read or written in the swap folder,
    the mean of both."""
    if medium is Medium.HOST:
        return 2 / copy_rate(CPU, COPIED)  # it counts what is read and what is written
    speed = disk_speed(disk or Path(tempfile.gettempdir()))
    return (1 / speed["cached_read_bytes_per_s"] + 1 / speed["cached_write_bytes_per_s"]) / 2


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title, caption="† the fastest peer")
    for heading in ("format", "layout", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("step ms", "tokens/s", "Triaxis ÷ it\nmedian (min–max)", "peak MiB\nper rank", "MiB\non disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        is_ours = figure.contender == OURS
        table.add_row(
            figure.dtype if is_ours else "",
            figure.layout if is_ours else "",
            figure.contender + " †" * figure.is_best_peer,
            f"{figure.step_s * 1e3:.0f}",
            f"{figure.tokens_per_s:,.0f}",
            "" if is_ours else str(figure.ratio),
            f"{figure.peak_bytes / 2**20:,.0f}",
            f"{figure.bytes_on_disk / 2**20:.0f}" if figure.bytes_on_disk else "",
            end_section=figure is figures[-1],
        )
    return table


def offload_table(figures: Iterable[Figure]) -> Table:
    table = Table(title=f"Steps that offload: the bound is (step without offload + bytes moved at the measured rate) / {SHARE}")
    table.add_column("format")
    table.add_column("layout", no_wrap=True)
    headings = ("step ms", "without\noffload ms", "MiB moved\nper rank", "moving ms", "GB/s", "step ÷ bound\nmedian (min–max)")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        if (bound := figure.bound) is not None:
            table.add_row(
                figure.dtype,
                figure.layout,
                f"{figure.step_s * 1e3:.0f}",
                f"{bound.resident_s * 1e3:.0f}",
                f"{bound.moved_bytes / 2**20:.0f}",
                f"{bound.moving_s * 1e3:.1f}",
                f"{bound.moved_bytes / bound.moving_s / 1e9:.2f}",
                str(bound.ratio),
            )
    return table


def main(arguments: Sequence[str]) -> int:
    parser = command_line(arguments, __doc__, SMALL, replace(TINY, seq_len=32, layers=4, micro_sequences=4))
    parser.add_argument("--nvme-path", type=Path, metavar="DIR", help="folder to swap in; default: a temporary folder")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME", help=", ".join(LAYOUTS))
    options = parser.parse_args(arguments)
    if options.nvme_path is not None and not options.nvme_path.is_dir():
        parser.error(f"--nvme-path {options.nvme_path} is not a folder: make it first")
    if PAIR * options.micro_sequences % MICRO_BATCHES:
        parser.error(
            f"--micro-sequences {options.micro_sequences}: a pipeline's {MICRO_BATCHES} micro-batches need a multiple of 4"
        )
    shape, console, figures = shape_of(options), make_console(), []
    torch.set_num_threads(1)  # as in the ranks, so that the figures report it
    try:
        shape.network()  # what cannot be is told before anything starts
        for dtype in formats_of(options, CPU, console):
            for layout in options.layouts:
                with console.status(f"{dtype}, {layout}"):
                    figures += measure(layout, shape, dtype, options.nvme_path, repeats=options.repeats)
    except UserError as error:
        console.print("\n".join(error.lines), style="red", markup=False)
        return error.exit_code
    console.print(table_of(figures, f"{PAIR} processes, 1 thread each; Llama: {shape} per rank; {options.repeats} repeats"))
    if any(figure.bound for figure in figures):
        console.print(offload_table(figures))
    write_json(options.json, "layouts", shape, figures)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main(sys.argv[1:]))
