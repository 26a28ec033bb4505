"""The time of one AdamW update on the CPU: torch's fused kernel beside DeepSpeed's CPU Adam.

    python tools/bench_optimizers.py [--build] [--json FILE]

DeepSpeed's is a C++ extension that must be compiled first (`--build`: minutes, once per machine);
torch's is not. Both update the same fp32 parameters with the same gradients, in turn and in an
order drawn anew, and must end at the same values.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from contest import Spread, interleaved, make_console, positive, seconds_of, write_json
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from rich.table import Table
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

CPU = torch.device("cpu")
WARM_UP = 3  # steps
TENSORS = 10  # the parameters come in this many pieces, as a model's do
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Both round in fp32, but in a different order; after 200 steps of 1e-3 the values have moved by
# about 0.2.
TOLERANCE = 1e-4
EXIT_NOT_BUILT, EXIT_DISAGREE = 3, 1


@dataclass(frozen=True)
class Work:
    """The work of both optimizers."""

    parameters: int
    steps: int


@dataclass(frozen=True)
class Figure:
    """The measurements of one optimizer. `tail` is p95 / median of its step times: 1 means that
    every step takes the same."""

    optimizer: str
    step_s: float
    parameters_per_s: float
    tail: float
    speed: Spread  # torch's step time / this one's, paired


def is_built() -> bool:
    """Return whether DeepSpeed's extension is ready, installed with DeepSpeed or compiled on this
    machine before."""
    if importlib.util.find_spec("deepspeed.ops.adam.cpu_adam_op") is not None:
        return True
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return any(root.glob("**/cpu_adam/cpu_adam.so"))


def same_parameters(work: Work) -> list[nn.Parameter]:
    """Return parameters and gradients, drawn anew from the same stream each time."""
    stream = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(TENSORS):
        parameter = nn.Parameter(torch.randn(work.parameters // TENSORS, generator=stream))
        parameter.grad = torch.randn(parameter.shape, generator=stream)
        parameters.append(parameter)
    return parameters


def measure(work: Work) -> tuple[list[Figure], float]:
    """Return the figures, and the largest difference of the two optimizers' parameters
    afterwards."""
    sets: dict[str, list[nn.Parameter]] = {name: same_parameters(work) for name in ("torch AdamW fused", "DeepSpeedCPUAdam")}
    reference, other = sets
    steps = {
        reference: torch.optim.AdamW(sets[reference], fused=True, **SETTINGS).step,
        other: DeepSpeedCPUAdam(sets[other], adamw_mode=True, **SETTINGS).step,
    }
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    samples = interleaved({name: partial(seconds_of, step, CPU) for name, step in steps.items()}, work.steps)
    figures = [
        Figure(
            optimizer=name,
            step_s=statistics.median(seconds),
            parameters_per_s=work.parameters / statistics.median(seconds),
            tail=statistics.quantiles(seconds, n=20)[-1] / statistics.median(seconds),
            speed=Spread.of_ratios(samples[reference], seconds),
        )
        for name, seconds in samples.items()
    ]
    return figures, largest_difference(sets[reference], sets[other])


@torch.no_grad()
def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title)
    table.add_column("optimizer")
    for heading in ("step ms", "parameters/s", "p95 / median", "speed / torch\nmedian (min–max)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        rate = f"{figure.parameters_per_s / 1e6:,.0f} M"
        table.add_row(figure.optimizer, f"{figure.step_s * 1e3:.2f}", rate, f"{figure.tail:.2f}", str(figure.speed))
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's extension where it is missing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON line per figure")
    parser.add_argument("--parameters", type=positive, default=10_000_000, help="elements; default %(default)s")
    parser.add_argument("--steps", type=positive, default=200, help="paired steps; default %(default)s")
    options = parser.parse_args(arguments)
    if options.parameters < TENSORS or options.steps < 2:
        parser.error(f"--parameters must be {TENSORS} or more and --steps 2 or more")
    console = make_console()
    logging.disable(logging.INFO)
    if not is_built():
        if not options.build:
            console.print("DeepSpeed's CPU Adam is not built on this machine: add --build (needs a C++ compiler and ninja)")
            return EXIT_NOT_BUILT
        with console.status("compiling DeepSpeed's CPU Adam"):
            CPUAdamBuilder().load(verbose=False)
    work = Work(options.parameters, options.steps)
    figures, difference = measure(work)
    title = f"{work.parameters:,} fp32 parameters, {work.steps} steps, {torch.get_num_threads()} threads"
    console.print(table_of(figures, title))
    console.print(f"Largest difference of the updated parameters: {difference:.1e} (allowed {TOLERANCE:g})")
    write_json(options.json, "optimizers", work, figures)
    return 0 if difference <= TOLERANCE else EXIT_DISAGREE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
