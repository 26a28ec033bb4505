"""The figures of one GPU with our layers: correct numbers first, then rates, memory and kernels.

    python tools/bench_gpu.py [--quick] [--device cpu] [--json FILE] [--wheels DIR]

In this order, each within what is left of `--budget` seconds (480):

* the tests marked `gpu`;
* losses and gradient norms of a small Llama at every ZeRO stage, beside those of the CPU;
* steps of Llamas of the classes 1 B and 8 B in bf16, whole rows and packed ones: tokens/s, MFU,
  peak memory, the share of a step in which the GPU computes, and the kernels it computes longest.
  Of the 8 B class there are as many of its 32 layers as the memory holds with AdamW: a layer's rate
  does not depend on their number;
* attention over packed documents: ours, a call for each document, and FlexAttention;
* bytes/s between the GPU and its host, and a step of the 1 B class that offloads everything.

It reads nothing from a network. On a machine without one, where torch and transformers are
installed, `--wheels DIR` installs the other packages from a folder that tools/gpu_wheels.sh made.
What fails, or does not fit, is a line in the table, and the rest is measured all the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET_S = 480.0
HELD_PER_WEIGHT = 18  # bytes of ZeRO-1: bf16, fp32 master weight, two moments, fp32 gradient
KERNELS = 8  # that are named of a step


def install(wheels: Path) -> None:
    """Add what is missing here from a folder of wheels."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *map(str, wheels.glob("*.whl"))]
    subprocess.run(command, check=True)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="first install the wheels of this folder")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help=f"seconds; default: {BUDGET_S:g}")
    return parser


OPTIONS = command_line().parse_args()
if OPTIONS.wheels is not None:
    install(OPTIONS.wheels)
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402  # all below may come from the wheels
from contest import (  # noqa: E402
    SEED,
    TOLERANCE,
    Shape,
    make_console,
    make_engine,
    our_step,
    require_agreement,
    seconds_of,
)
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from parallel.attention import Reach, attend, attend_in_each  # noqa: E402
from parallel.documents import Documents  # noqa: E402
from parallel.fusable import FUSING  # noqa: E402
from parallel.gpu_attention import flex_attention  # noqa: E402
from parallel.mesh import Mesh  # noqa: E402
from parallel.topology import Layout  # noqa: E402
from trainer.costs.blocks import count_parameters  # noqa: E402
from trainer.costs.flops import training_flops  # noqa: E402
from trainer.engine.engine import Engine  # noqa: E402
from trainer.engine.matmul_peak import device_peak  # noqa: E402
from trainer.launch import ranks  # noqa: E402
from trainer.model.config import TransformerConfig  # noqa: E402
from trainer.model.hf_config import from_hf  # noqa: E402

Facts = dict[str, Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Model(Shape):
    """A Llama whose key/value heads are shared by query heads."""

    kv_heads: int = 8

    def network(self) -> TransformerConfig:
        given = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.seq_len,
        }
        return from_hf("llama", given)


LLAMA = {"vocab": 128_256, "seq_len": 4096, "kv_heads": 8, "heads": 32}
CLASSES = {
    "1 B": Model(layers=16, hidden=2048, ffn=8192, micro_sequences=2, **LLAMA),
    "8 B": Model(layers=32, hidden=4096, ffn=14_336, micro_sequences=1, **LLAMA),
}
SMALL = Model(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=256, seq_len=64, micro_sequences=2)


class Bench:
    """A run of all measurements on one device, and the facts so far."""

    def __init__(self, options: argparse.Namespace, mesh: Mesh, device: torch.device, console: Console) -> None:
        self.quick, self.mesh, self.device, self.console = options.quick, mesh, device, console
        self.end = time.monotonic() + options.budget
        self.facts: list[Facts] = []

    def run(self) -> None:
        for name, part in (
            ("tests marked gpu", self.tests),
            ("losses beside the CPU's", self.losses),
            ("steps", self.steps),
            ("attention over packed documents", self.attention),
            ("offload", self.offload),
        ):
            self.console.rule(name)
            if time.monotonic() > self.end:
                self.note(part=name, failed="the budget is spent")
                continue
            self.attempt(name, part)

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Run a part; what it raises becomes a fact, and its memory is given back."""
        try:
            part()
        except Exception as error:  # a part that fails must not end the others
            self.note(part=name, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def note(self, **fact: Any) -> None:
        self.facts.append(fact)
        self.console.print(", ".join(f"{key} {shown(value)}" for key, value in fact.items()))

    # ------------------------------------------------------------------------ parts

    def tests(self) -> None:
        # Only files with such tests: the others import packages that may be missing here.
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, sorted(marked))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        self.note(part="tests", said=(done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1], code=done.returncode)

    def losses(self) -> None:
        batch = SMALL.batch(SEED, documents=2)
        for dtype in ("fp32", "bf16"):
            numbers = {}
            for stage, device in ((0, CPU), *((stage, self.device) for stage in range(4))):
                engine = make_engine(SMALL, self.mesh, device, dtype=dtype, zero={"stage": stage})
                numbers[f"{device.type}, ZeRO-{stage}"] = [our_step(engine, [batch]) for _ in range(3)]
                engine.close()
            require_agreement(dtype, numbers, TOLERANCE[dtype])
            self.note(part="losses", format=dtype, equal_within=TOLERANCE[dtype], contenders=list(numbers))

    def steps(self) -> None:
        for name, model in {"tiny": SMALL}.items() if self.quick else self.classes():
            for documents in (1, 8):
                what = f"{name}, {documents} document{'s' if documents > 1 else ''} a row"
                self.attempt(what, partial(self.step, name, model, documents, {"stage": 1}, profiled=documents == 1))

    def classes(self) -> Iterator[tuple[str, Model]]:
        """Yield the models, with as many layers as the memory holds."""
        there = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 16 << 30
        for name, model in CLASSES.items():
            alone, layer = (count_parameters(replace(model, layers=layers).network()) for layers in (1, 2))
            layer -= alone
            room = 0.6 * there / HELD_PER_WEIGHT - (alone - layer)  # the rest is for activations
            layers = min(model.layers, max(1, int(room / layer)))
            yield f"{name}, {layers} of {model.layers} layers", replace(model, layers=layers)

    def step(self, name: str, model: Model, documents: int, zero: Facts, *, profiled: bool) -> None:
        batch, network = model.batch(SEED, documents=documents), model.network()
        engine = make_engine(model, self.mesh, self.device, dtype="bf16", zero=zero)
        try:
            work = partial(our_step, engine, [batch])
            for _ in range(2):
                work()
            taken = [seconds_of(work, self.device) for _ in range(3 if self.quick else 8)]
            kernels = list(self.kernels(work)) if profiled and self.device.type == "cuda" else []
            compiled = self.compiled_seconds(engine, work)
        finally:
            engine.close()
        peak, source = device_peak(self.device, "bf16")
        seconds = statistics.median(taken)
        flops = training_flops(network, [length for row in batch.documents.lengths for length in row])
        self.note(
            part="step",
            model=name,
            parameters=count_parameters(network),
            documents_a_row=documents,
            zero=zero,
            seconds=seconds,
            seconds_compiled=compiled,
            tokens_per_s=model.tokens / seconds,
            mfu=flops / seconds / peak,
            peak=source,
            memory_gib=torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None,
            busy=sum(time for _, time in kernels) / seconds if kernels else None,
            kernels=[f"{name[:60]} {share / seconds:.1%}" for name, share in kernels[:KERNELS]],
        )

    def compiled_seconds(self, engine: Engine, work: Callable[[], object]) -> float | str:
        """Return the median time of a compiled step [s], or what the compiler said."""
        engine.compiles = True
        for _ in range(2):
            work()
        taken = [seconds_of(work, self.device) for _ in range(3 if self.quick else 8)]
        return FUSING.failure or statistics.median(taken)

    def kernels(self, work: Callable[[], object]) -> Iterator[tuple[str, float]]:
        """Yield the kernels of a step with their seconds, the longest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds_of(work, self.device)
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        yield from ((event.key, event.self_device_time_total / 1e6) for event in events if event.self_device_time_total)

    def attention(self) -> None:
        H, G, K, S, documents = (4, 2, 16, 64, 4) if self.quick else (32, 8, 128, 4096, 8)
        length = S // documents
        lengths = Documents(((length,) * documents,) * 2)
        q, k, v = (
            torch.randn(2, S, heads, K, device=self.device, dtype=torch.bfloat16, requires_grad=True) for heads in (H, G, G)
        )
        contenders = {
            "ours": partial(attend, q, k, v, lengths, causal=True),
            "a call for each document": partial(attend_in_each, q, k, v, lengths.spans(lengths), Reach(causal=True)),
        }
        if self.device.type == "cuda":  # torch has no backward of it on CPUs
            numbers = lengths.numbers_BS, lengths.numbers_BS
            contenders["FlexAttention"] = partial(flex_attention, q, k, v, numbers, causal=True)
        expected = contenders["ours"]().detach()
        for name, contender in contenders.items():
            self.attempt(name, partial(self.attend, name, contender, expected, (q, k, v)))

    def attend(self, name: str, work: Callable[[], Tensor], expected: Tensor, inputs: Sequence[Tensor]) -> None:
        difference = float((work().detach() - expected).abs().max())
        # bf16 has 8 bits: seen 0.016 between kernels
        assert difference < 0.05, f"it differs by {difference}"
        grad = torch.ones_like(expected)
        once = lambda: torch.autograd.grad(work(), inputs, grad)  # noqa: E731
        once()
        taken = [seconds_of(once, self.device) for _ in range(5)]
        self.note(part="attention", by=name, seconds=statistics.median(taken), differs_by=difference)

    def offload(self) -> None:
        if self.device.type == "cuda":
            size = 1 << 30
            host, there = (
                torch.empty(size, dtype=torch.uint8, pin_memory=True),
                torch.empty(size, dtype=torch.uint8, device=self.device),
            )
            for name, copy in (("to the GPU", partial(there.copy_, host)), ("to the host", partial(host.copy_, there))):
                taken = [seconds_of(partial(copy, non_blocking=True), self.device) for _ in range(5)]
                self.note(part="copies", direction=name, gb_per_s=size / min(taken) / 1e9)
            del host, there
        everything = {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": self.device.type == "cuda"},
            "offload_param": {"device": "cpu", "pin_memory": self.device.type == "cuda"},
        }
        model = SMALL if self.quick else CLASSES["1 B"]
        self.step("1 B, offloaded" if not self.quick else "tiny, offloaded", model, 1, everything, profiled=False)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_of(facts: Sequence[Facts]) -> Table:
    """Return the table of steps."""
    table = Table("model", "documents\na row", "tokens/s", "MFU", "GiB", "GPU busy", title="Steps in bf16")
    for fact in facts:
        if fact.get("part") == "step":
            share = "–" if fact["busy"] is None else f"{fact['busy']:.0%}"
            memory = "–" if fact["memory_gib"] is None else f"{fact['memory_gib']:.1f}"
            cells = (fact["model"], str(fact["documents_a_row"]), f"{fact['tokens_per_s']:,.0f}", f"{fact['mfu']:.1%}")
            table.add_row(*cells, memory, share)
    return table


def main(options: argparse.Namespace) -> int:
    console = make_console()
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("torch finds no CUDA device here; --device cpu --quick shows that the benchmark runs", style="red")
        return 3
    logging.disable(logging.INFO)  # DeepSpeed announces each of its settings
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's of torch's collectives
    place = ranks.Place.from_environment({})
    try:
        ranks.join(place, timedelta(minutes=10))
        device = CPU if options.device == "cpu" else place.device
        bench = Bench(options, Mesh.build(Layout()), device, console)
        bench.run()
        console.print(table_of(bench.facts))
    finally:
        ranks.leave()
    if options.json is not None:
        about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU"}
        options.json.write_text(json.dumps({**about, "facts": bench.facts}, indent=1), encoding="utf-8")
    return 1 if any("failed" in fact for fact in bench.facts) else 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
