"""Fine-tuning beside the trainers that are used for it: packed answers, LoRA and DPO beside trl
and peft, translation beside transformers' Seq2SeqTrainer.

    python tools/bench_tuning.py [--quick] [--works sft lora dpo translate] [--json FILE]

Each side is a process of its own, which runs its whole loop: `trainer.loop.train` of a recipe, or
the trainer's `train()`. A step begins when the loop gets its turn and ends when it asks for the
next one, so that collating, logging and all else around the model count; reading, tokenizing and
packing lie before. Both sides have the same initial weights and take the same documents in each
step, with AdamW, clipping at norm 1, and the loss divided by the step's targets or pairs. Losses
and gradient norms of the first two steps must agree before anything is timed.

What differs is what each makes of a step's documents. We pack whole ones into rows of `--seq-len`
tokens. trl flattens such rows into one and gives attention a mask of all against all, on a CPU;
that mask is smaller where a micro-batch is one row ("row by row"); unpacked documents are padded to
the longest ("padded", and both DPO and Seq2SeqTrainer have no other way), which is less where a
micro-batch has the pairs of one row ("pairs by row"). The log-probabilities before training are
computed before the first step by us, and by trl if it is asked to; by default it computes them in
each step ("reference in the step").
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from contest import (
    TINY,
    TOLERANCE,
    WARM_UP,
    Numbers,
    Shape,
    Spread,
    command_line,
    formats_of,
    interleaved,
    make_console,
    require_agreement,
    shape_of,
    write_json,
)
from rich.table import Table
from tuning.turns import Loop, LoopFailed, run
from tuning.work import WORKS, Place, lay_out

from trainer.errors import UserError
from trainer.schema import Dtype

OURS = "Triaxis"
SMALL = Shape(layers=4)
PACKED = ("trl, rows flattened", "trl, row by row", "trl, padded")
PEERS: Mapping[str, Sequence[str]] = {
    "sft": PACKED,
    "lora": PACKED,
    "dpo": ("trl, all pairs", "trl, pairs by row", "trl, reference in the step"),
    "translate": ("Seq2SeqTrainer",),
}
ALL_PEERS = tuple(dict.fromkeys(peer for peers in PEERS.values() for peer in peers))
IGNORE = -100


@dataclass(frozen=True)
class Figure:
    """A row of the table: a work in a format, beside one peer."""

    work: str
    dtype: Dtype
    peer: str
    tokens_per_s: float  # real ones: neither filler nor padding
    targets_per_s: float
    peer_tokens_per_s: float
    ratio: Spread  # of tokens/s, ours over the peer's
    peak_gib: float  # resident, with all that is imported
    peer_peak_gib: float


def measure(name: str, shape: Shape, dtype: Dtype, folder: Path, peers: Sequence[str], *, repeats: int) -> list[Figure]:
    """Return the rows of the table for a work in a format: start all sides, check that they agree,
    time their steps in turn, and end them."""
    place = Place(folder / f"{name}-{dtype}")
    lay_out(place, WORKS[name], shape, dtype, repeats=repeats)
    run("reading the rows", ["tuning.rows", str(place.recipe), str(place.folder)], place.folder / "rows.log")
    with ExitStack() as stack:
        loops = {loop.name: stack.enter_context(closing(loop)) for loop in started(place, dtype, peers)}
        numbers: dict[str, list[Numbers]] = {side: [] for side in loops}
        for side, loop in loops.items():
            for _ in range(WARM_UP):
                step = loop.step()
                numbers[side].append((step.loss, step.grad_norm))
        require_agreement(f"{name}, {dtype}", numbers, TOLERANCE[dtype])
        seconds = interleaved({side: lambda loop=loop: loop.step().seconds for side, loop in loops.items()}, repeats)
        peaks = {side: loop.end() for side, loop in loops.items()}
    tokens, targets = counts(place, repeats)
    rates = {side: statistics.median(n / s for n, s in zip(tokens, seconds[side], strict=True)) for side in loops}
    return [
        Figure(
            work=name,
            dtype=dtype,
            peer=peer,
            tokens_per_s=rates[OURS],
            targets_per_s=statistics.median(n / s for n, s in zip(targets, seconds[OURS], strict=True)),
            peer_tokens_per_s=rates[peer],
            ratio=Spread.of_ratios(seconds[peer], seconds[OURS]),
            peak_gib=peaks[OURS],
            peer_peak_gib=peaks[peer],
        )
        for peer in peers
    ]


def started(place: Place, dtype: Dtype, peers: Sequence[str]) -> Iterator[Loop]:
    """Yield our loop and the peers', while they start."""
    yield Loop(OURS, "tuning.ours", place.recipe, place.folder / "ours.log")
    for number, peer in enumerate(peers):
        job = place.folder / f"peer-{number}.json"
        job.write_text(json.dumps({"peer": peer, "folder": str(place.folder), "dtype": dtype}), encoding="utf-8")
        yield Loop(peer, "tuning.peers", job, job.with_suffix(".log"))


def counts(place: Place, repeats: int) -> tuple[list[int], list[int]]:
    """Return the real tokens and the targets of each timed step."""
    steps = json.loads(place.rows.read_text(encoding="utf-8"))[WARM_UP : WARM_UP + repeats]
    documents = [[document for row in step for document in row] for step in steps]
    tokens = [sum(len(ids) for ids, _ in step) for step in documents]
    targets = [sum(label != IGNORE for _, labels in step for label in labels) for step in documents]
    return tokens, targets


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title)
    for heading in ("work", "format", "peer"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "Triaxis\ntokens/s",
        "targets/s",
        "peer\ntokens/s",
        "ratio\nmedian (min–max)",
        "Triaxis\npeak GiB",
        "peer\npeak GiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(
            figure.work,
            figure.dtype,
            figure.peer,
            f"{figure.tokens_per_s:,.0f}",
            f"{figure.targets_per_s:,.0f}",
            f"{figure.peer_tokens_per_s:,.0f}",
            str(figure.ratio),
            f"{figure.peak_gib:.2f}",
            f"{figure.peer_peak_gib:.2f}",
        )
    table.caption = "tokens without filler and padding; peak: resident, with all that is imported"
    return table


def main(arguments: Sequence[str]) -> int:
    parser = command_line(arguments, __doc__, SMALL, TINY)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS), help="works to measure; default: all")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these peers, by the names in the table")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.peers or ()) - set(ALL_PEERS)):
        parser.error(f"--peers {', '.join(map(repr, unknown))}: legal are {', '.join(map(repr, ALL_PEERS))}")
    shape, console = shape_of(options), make_console()
    figures: list[Figure] = []
    dtypes = formats_of(options, torch.device("cpu"), console)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-tuning-") as folder:
            for name in options.works:
                peers = [peer for peer in PEERS[name] if peer in (options.peers or PEERS[name])]
                for dtype in dtypes if peers else ():
                    with console.status(f"{name}, {dtype}"):
                        figures += measure(name, shape, dtype, Path(folder), peers, repeats=options.repeats)
    except UserError as error:
        console.print("\n".join(error.lines), style="red", markup=False)
        return error.exit_code
    except LoopFailed as error:
        console.print(str(error), style="red", markup=False)
        return 70
    console.print(table_of(figures, f"Tuning: {shape}; {options.repeats} repeats"))
    write_json(options.json, "tuning", shape, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
