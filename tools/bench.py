"""Tokens per second and memory of one process: Triaxis beside transformers, plain and compiled, and
litgpt.

    python tools/bench.py [--quick] [--profile] [--json FILE] [--litgpt PYTHON]

All train the same model: same initial weights, same batch, AdamW with the same two parameter
groups, gradients clipped to norm 1. In bf16 all hold fp32 master weights, accumulate and clip in
fp32, and multiply in bf16: Triaxis casts a weight where it is used, a peer keeps a bf16 copy of the
model, which it refreshes after each step. Before anything is timed, losses and gradient norms of
the first two steps must agree; the second one follows an update. What torch.compile does, it does
in those.

Each contender is a process of its own (`contenders`), with all threads, and they take turns. Its
memory is the most that a step had resident beyond what the process had when it had imported
everything, mapped files aside; on a GPU, torch's tensors. The matrix products that a step is
compared with are measured between them: torch's `a @ b`, which is MKL's in fp32 on CPUs, and the
fastest there is (`parallel.products`).

litgpt pins an old hub client, so it needs an environment of its own:

    python -m venv litgpt && litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13
    python tools/bench.py --litgpt litgpt/bin/python

It knows no documents within a row, so it takes part in whole rows alone.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from contenders import Elsewhere, Loop, Opener, Place, Ranks, first_steps, opened, step_by_step
from contest import (
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
    peers_update,
    positive,
    require_agreement,
    seconds_of,
    shape_of,
    write_json,
)
from hugging_face_peer import FirstWeights, hugging_face_inputs, hugging_face_model
from plain_loop import PlainLoop
from rich.table import Table
from safetensors.torch import save_file

from parallel.mesh import Mesh
from parallel.topology import Layout
from trainer.costs.flops import training_flops
from trainer.engine.execution import DTYPES
from trainer.engine.matmul_peak import measured_peak
from trainer.errors import UserError
from trainer.launch import ranks
from trainer.schema import Dtype

OURS, PLAIN, COMPILED, LITGPT = "Triaxis", "transformers", "transformers, compiled", "litgpt"
WHOLE_ROWS = 1  # documents in a row
PRODUCT_SIZE, PRODUCTS = 1024, 5


@dataclass(frozen=True)
class Work:
    """The work of the contenders of one comparison."""

    shape: Shape
    dtype: Dtype
    documents: int  # in each row
    place: Place

    def __str__(self) -> str:
        return f"{self.dtype}, sequence {self.shape.seq_len}, documents per row {self.documents}"


@dataclass(frozen=True)
class Figure:
    """A contender in one comparison."""

    dtype: Dtype
    seq_len: int
    documents_per_row: int
    micro_sequences: int
    contender: str
    tokens_per_s: float
    ratio: Spread  # Triaxis's tokens/s over this one's
    product_share: Spread  # MFU against torch's a @ b of the same repeat
    peak_share: Spread  # MFU against the fastest product of the same repeat
    product_flops_per_s: float
    peak_flops_per_s: float
    peak_bytes: int
    is_best_peer: bool


def our_loop(work: Work, folder: Path) -> Loop:
    engine = make_engine(work.shape, Mesh.build(Layout()), work.place.device, dtype=work.dtype, zero={"stage": 0})
    return step_by_step(partial(our_step, engine, [work.shape.batch(SEED, documents=work.documents)]))


def hugging_face_loop(work: Work, folder: Path, *, compiled: bool) -> Loop:
    network = work.shape.network()
    first = FirstWeights.of(network, seed=SEED)
    model = hugging_face_model(network, first).to(work.place.device)
    call = torch.compile(model) if compiled else model
    inputs = hugging_face_inputs(work.shape.batch(SEED, documents=work.documents), work.place.device)
    plain = PlainLoop(model, lambda: call(**inputs).loss, peers_update(), first.matrices, DTYPES[work.dtype])
    return step_by_step(plain.step)


def open_litgpt(work: Work, python: Path, folder: Path) -> Elsewhere:
    """Start litgpt with the weights and the batch in files."""
    folder.mkdir()
    network, batch = work.shape.network(), work.shape.batch(SEED, documents=work.documents)
    weights, tokens = folder / "weights.safetensors", folder / "batch.safetensors"
    first = FirstWeights.of(network, seed=SEED)
    save_file(first.tensors, weights)
    save_file({"tokens": batch.tokens_BS, "targets": batch.targets_BS}, tokens)
    about = {
        "weights": str(weights),
        "batch": str(tokens),
        "matrices": sorted(first.matrices),
        "shape": asdict(work.shape),
        "norm_eps": network.norm_eps,
        "rope_base": int(network.rope_theta),
        "update": asdict(peers_update()),
        "dtype": str(DTYPES[work.dtype]).removeprefix("torch."),
        "device": str(work.place.device),
        "threads": work.place.threads,
    }
    return Elsewhere(LITGPT, python, "litgpt_peer.py", about, folder)


def openers_of(work: Work, litgpt: Path | None) -> dict[str, Opener]:
    loops = {
        OURS: our_loop,
        PLAIN: partial(hugging_face_loop, compiled=False),
        COMPILED: partial(hugging_face_loop, compiled=True),
    }
    openers: dict[str, Opener] = {name: partial(Ranks, name, partial(loop, work), work.place) for name, loop in loops.items()}
    if litgpt is not None and work.documents == WHOLE_ROWS:
        openers[LITGPT] = partial(open_litgpt, work, litgpt)
    return openers


def torch_product(device: torch.device, dtype: Dtype) -> float:
    """Return the median speed [FLOP/s] of torch's own product of square matrices."""
    a, b = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return 2 * PRODUCT_SIZE**3 / statistics.median(seconds_of(lambda: a @ b, device) for _ in range(PRODUCTS))


def measure(work: Work, litgpt: Path | None, *, repeats: int) -> list[Figure]:
    """Return the figures of one comparison: build all sides, check that they agree, time them in
    turn."""
    peaks: dict[str, int] = {}
    with opened(openers_of(work, litgpt)) as contenders:
        require_agreement(str(work), first_steps(contenders, WARM_UP), TOLERANCE[work.dtype])

        def seconds(name: str) -> float:
            answer = contenders[name].step()
            peaks[name] = max(peaks.get(name, 0), answer.peak_bytes)
            return answer.step_s

        products = {"product": torch_product, "peak": measured_peak}
        rates = {name: partial(rate, work.place.device, work.dtype) for name, rate in products.items()}
        samples = interleaved({name: partial(seconds, name) for name in contenders} | rates, repeats)
    lengths = [length for row in work.shape.batch(SEED, documents=work.documents).documents.lengths for length in row]
    flops = training_flops(work.shape.network(), lengths)
    best_peer = min((name for name in peaks if name != OURS), key=lambda name: statistics.median(samples[name]))
    return [
        Figure(
            dtype=work.dtype,
            seq_len=work.shape.seq_len,
            documents_per_row=work.documents,
            micro_sequences=work.shape.micro_sequences,
            contender=name,
            tokens_per_s=work.shape.tokens / statistics.median(samples[name]),
            ratio=Spread.of_ratios(samples[name], samples[OURS]),
            product_share=Spread.of_ratios([flops / s for s in samples[name]], samples["product"]),
            peak_share=Spread.of_ratios([flops / s for s in samples[name]], samples["peak"]),
            product_flops_per_s=statistics.median(samples["product"]),
            peak_flops_per_s=statistics.median(samples["peak"]),
            peak_bytes=peaks[name],
            is_best_peer=name == best_peer,
        )
        for name in contenders
    ]


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title)
    for heading in ("format", "sequence", "documents\na row"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for heading in (
        "tokens/s",
        "Triaxis ÷ it\nmedian (min–max)",
        "share of\na @ b",
        "of best\nproduct",
        "both\nGFLOP/s",
        "peak\nMiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        is_ours = figure.contender == OURS
        table.add_row(
            figure.dtype if is_ours else "",
            f"{figure.seq_len}" if is_ours else "",
            (f"{figure.documents_per_row}" + "*" * (figure.documents_per_row > 1)) if is_ours else "",
            figure.contender + " †" * figure.is_best_peer,
            f"{figure.tokens_per_s:,.0f}",
            "" if is_ours else str(figure.ratio),
            f"{figure.product_share.median:.0%}",
            f"{figure.peak_share.median:.0%}",
            f"{figure.product_flops_per_s / 1e9:,.0f}, {figure.peak_flops_per_s / 1e9:,.0f}" if is_ours else "",
            f"{figure.peak_bytes / 2**20:,.0f}",
        )
    table.caption = "† the fastest peer"
    if any(figure.documents_per_row > 1 for figure in figures):
        table.caption += "; * the peers compute the same with an explicit block-diagonal mask [B, 1, S, S]"
    return table


def profile_of(shape: Shape, dtype: Dtype, device: torch.device, *, rows: int = 12) -> Table:
    """Return a table of the operators in which one of our steps (whole rows) spends most of its
    time."""
    batch = shape.batch(SEED, documents=WHOLE_ROWS)
    engine = make_engine(shape, Mesh.build(Layout()), device, dtype=dtype, zero={"stage": 0})
    for _ in range(WARM_UP):
        our_step(engine, [batch])
    with torch.profiler.profile() as profiler:
        our_step(engine, [batch])
    engine.close()
    on_cuda = device.type == "cuda"
    times = [(e.self_device_time_total if on_cuda else e.self_cpu_time_total, e) for e in profiler.key_averages()]
    total = sum(microseconds for microseconds, _ in times)
    table = Table("operator", "calls", "ms", "share", title=f"One step of Triaxis in {dtype}: self time")
    for microseconds, event in sorted(times, key=lambda item: -item[0])[:rows]:
        table.add_row(event.key, str(event.count), f"{microseconds / 1e3:.1f}", f"{microseconds / total:.1%}")
    return table


def shapes_of(first: Shape, seq_lens: Sequence[int]) -> list[Shape]:
    """Return the shape at each length, with as many tokens in a micro-batch as at the first, but
    one whole row at least."""
    return [replace(first, seq_len=n, micro_sequences=max(1, first.tokens // n)) for n in seq_lens]


def main(arguments: Sequence[str]) -> int:
    is_quick = "--quick" in arguments
    parser = command_line(arguments, __doc__, Shape(), TINY, without=("seq_len",))
    parser.add_argument(
        "--seq-lens", nargs="+", type=positive, default=[TINY.seq_len] if is_quick else [512, 2048, 8192], help="of the rows"
    )
    parser.add_argument("--documents", type=positive, default=3, help="documents in a packed row; default %(default)s")
    parser.add_argument("--rows", nargs="+", choices=("whole", "packed"), default=("whole", "packed"), help="default: both")
    parser.add_argument("--litgpt", type=Path, metavar="PYTHON", help="the interpreter of litgpt's own environment")
    parser.add_argument("--profile", action="store_true", help="also show the operators of one step")
    options = parser.parse_args(arguments)
    if options.documents > min(options.seq_lens):
        parser.error(f"--documents {options.documents} cannot lie in a row of --seq-lens {min(options.seq_lens)} tokens")
    if options.litgpt is not None and not options.litgpt.is_file():
        parser.error(f"--litgpt {options.litgpt} is no interpreter: --help says how to make its environment")
    logging.disable(logging.INFO)  # DeepSpeed announces each of its settings
    console, first = make_console(), replace(shape_of(options), seq_len=options.seq_lens[0])
    here = ranks.Place.from_environment({})
    place = Place(ranks=1, threads=torch.get_num_threads(), device=here.device)
    documents = [{"whole": WHOLE_ROWS, "packed": options.documents}[rows] for rows in options.rows]
    figures: list[Figure] = []
    try:
        first.network()  # what cannot be is told before anything starts
        dtypes = formats_of(options, place.device, console)
        for shape in shapes_of(first, options.seq_lens):
            for work in (Work(shape, dtype, d, place) for dtype in dtypes for d in sorted(set(documents))):
                with console.status(str(work)):
                    figures += measure(work, options.litgpt, repeats=options.repeats)
        console.print(table_of(figures, f"Llama: {first}; {place.threads} threads, {options.repeats} repeats"))
        if options.litgpt is None:
            console.print("no row of litgpt: it needs an environment of its own, --litgpt PYTHON; --help says how to make it")
        write_json(options.json, "single_process", first, figures)
        if options.profile:
            with ranks.joined(here, timedelta(minutes=30)):
                for dtype in dtypes:
                    console.print(profile_of(first, dtype, place.device))
    except UserError as error:
        console.print("\n".join(error.lines), style="red", markup=False)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(main(sys.argv[1:]))
