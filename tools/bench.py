"""Tokens per second of one process: Triaxis beside the plain PyTorch loop over transformers' Llama.

    python tools/bench.py [--quick] [--profile] [--json FILE]

Both sides train the same model: same initial weights, same batch, AdamW with the same two parameter
groups, gradients clipped to norm 1. In bf16 both hold fp32 master weights, accumulate and clip in
fp32, and multiply in bf16: Triaxis casts a weight where it is used, the peer keeps a bf16 copy of
the model, which it refreshes after each step. Before anything is timed, losses and gradient norms
of the first two steps must agree; the second one follows an update.

A virtual machine's speed drifts by a third within minutes, so only ratios count: in each repeat
every contender takes one whole step, in an order drawn anew, and steps of the same repeat are
paired. The matrix product that the step is compared with (`trainer.engine.matmul_peak`) is measured
in the same repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel.attention import Documents
from parallel.gather import logical_tensors
from parallel.mesh import Mesh
from parallel.params import Role, initialise
from parallel.topology import Layout
from trainer.costs.flops import training_flops
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.execution import DTYPES
from trainer.engine.matmul_peak import measured_peak
from trainer.errors import UserError
from trainer.launch import ranks
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf, to_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Dtype, Recipe

SEED = 0
LR = 3e-4
CLIP_NORM = 1.0
WARM_UP = 2  # steps; also the steps whose losses and norms are compared
# Relative differences of losses and gradient norms. Up to 2e-6 was seen in fp32, and 4e-3 in bf16
# (8 bits, rounded in other places).
TOLERANCE: Mapping[Dtype, float] = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Shape:
    """A Llama and its micro-batch; each field is an option of the command."""

    layers: int = 8
    hidden: int = 512
    ffn: int = 1408
    heads: int = 8
    vocab: int = 8192
    seq_len: int = 512
    micro_sequences: int = 4

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, ffn {self.ffn}, {self.heads} heads, vocabulary {self.vocab}, "
            f"sequence {self.seq_len}, micro-batch {self.micro_sequences}"
        )

    @property
    def tokens(self) -> int:
        """The number of tokens in one micro-batch."""
        return self.micro_sequences * self.seq_len

    def network(self) -> TransformerConfig:
        hugging_face = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.seq_len,
        }
        return from_hf("llama", hugging_face)

    def batch(self, seed: int, *, documents: int) -> MicroBatch:
        """Return random tokens in rows of `documents` documents each, cut at random places; every
        position is a target."""
        stream = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.vocab, (self.micro_sequences, self.seq_len + 1), generator=stream)
        dice = random.Random(seed)
        rows = []
        for _ in range(self.micro_sequences):
            cuts = [0, *sorted(dice.sample(range(1, self.seq_len), documents - 1)), self.seq_len]
            rows.append(tuple(end - start for start, end in itertools.pairwise(cuts)))
        return MicroBatch(tokens[:, :-1].contiguous(), Documents(tuple(rows)), tokens[:, 1:].contiguous())


TINY = Shape(layers=2, hidden=64, ffn=128, heads=2, vocab=256, seq_len=64, micro_sequences=2)


def make_engine(
    shape: Shape,
    mesh: Mesh,
    device: torch.device,
    *,
    dtype: Dtype,
    zero: Mapping[str, Any],
    parallel: Mapping[str, Any] | None = None,
    micro_batches: int = 1,
) -> Engine:
    """Build Triaxis on `shape.micro_sequences` rows per data-parallel rank and step, started from
    the weights of `SEED`."""
    recipe = Recipe.model_validate(
        {
            "model": {"family": "llama"},
            "data": {"seq_len": shape.seq_len},
            "batch": {
                "global_sequences": shape.micro_sequences * mesh.data.size,
                "micro_sequences": shape.micro_sequences // micro_batches,
            },
            "parallel": parallel or {},
            "precision": {"dtype": dtype},
            "zero": zero,
            "optimizer": {"name": "adamw", "lr": LR},
            "train": {"clip_norm": CLIP_NORM},
        }
    )
    plan = BatchPlan.from_recipe(recipe, mesh.layout.world_size, "the benchmark")
    network = shape.network()
    return Engine(
        recipe,
        plan,
        network,
        mesh,
        device,
        deepspeed_config=deepspeed_config(recipe, plan, largest_weight=network.largest_weight),
        fill=lambda block: initialise(block, seed=SEED),
    )


# The result of a contender's step: (loss, gradient norm before clipping).
Numbers = tuple[float, float]


class PlainLoop:
    """A loop over transformers' Llama (sdpa attention), written as its users write it."""

    def __init__(self, engine: Engine, network: TransformerConfig, *, dtype: Dtype, device: torch.device) -> None:
        """Start from the engine's weights and optimizer settings."""
        from transformers import LlamaConfig, LlamaForCausalLM

        hugging_face = to_hf(network, dtype=str(DTYPES[dtype]).removeprefix("torch."), eos_token_id=None)
        config = LlamaConfig(**{**hugging_face, "use_cache": False}, attn_implementation="sdpa")
        self.model = LlamaForCausalLM(config)
        self.model.load_state_dict(logical_tensors(engine.local_tensors()))  # copied into fp32
        self.model.to(device).train()
        self.parameters = self.masters = list(self.model.parameters())
        if dtype != "fp32":
            self.masters = [parameter.detach().clone() for parameter in self.parameters]
            # Not `model.to(dtype)`, which would also round the rotary frequencies.
            for parameter in self.parameters:
                parameter.data = parameter.data.to(DTYPES[dtype])
        self.optimizer = self._optimizer(engine)

    def _optimizer(self, engine: Engine) -> torch.optim.Optimizer:
        keys = engine.recipe.optimizer
        matrices = {piece.name for _, spec in engine.specs if spec.role is Role.MATRIX for piece in spec.pieces}
        named = [(name in matrices, m) for (name, _), m in zip(self.model.named_parameters(), self.masters, strict=True)]
        groups = [
            {"params": [m for is_matrix, m in named if is_matrix], "weight_decay": keys.weight_decay},
            {"params": [m for is_matrix, m in named if not is_matrix], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=keys.lr, betas=(keys.betas[0], keys.betas[1]), eps=keys.eps, fused=True)

    def step(self, inputs: Mapping[str, Tensor]) -> Numbers:
        loss = self.model(**inputs).loss
        loss.backward()
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, CLIP_NORM)
        self.optimizer.step()
        if self.masters is not self.parameters:
            torch._foreach_copy_([parameter.data for parameter in self.parameters], self.masters)
        self.model.zero_grad()
        return float(loss.detach()), float(norm)


def peer_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """Return the batch as keyword arguments of transformers. Whole rows need no mask: sdpa's own
    causal kernel serves them.

    Packed rows get positions that restart and an explicit block-diagonal causal mask, bool [B, 1,
    S, S]. It is made here, once, outside the peer's time.
    """
    inputs = {"input_ids": batch.tokens_BS, "labels": batch.labels_BS, "shift_labels": batch.labels_BS}
    if any(len(row) > 1 for row in batch.documents.lengths):
        document_BS = torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in batch.documents.lengths]
        )
        same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
        inputs["attention_mask"] = same_BSS.tril()[:, None]
        inputs["position_ids"] = batch.documents.positions_BS
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class Disagreement(UserError):
    """The error that two contenders did not train the same model."""


def require_agreement(what: str, numbers: Mapping[str, Sequence[Numbers]], tolerance: float) -> None:
    """Raise Disagreement unless every contender's losses and norms equal the first one's, step by
    step, within `tolerance`."""
    (reference, expected), *others = numbers.items()
    for name, got in others:
        for step, (pair, wanted) in enumerate(zip(got, expected, strict=True)):
            for quantity, value, other in zip(("loss", "gradient norm"), pair, wanted, strict=True):
                if not math.isclose(value, other, rel_tol=tolerance):
                    raise Disagreement(
                        f"{what}, step {step}: {quantity} of {name} is {value:.6g}, of {reference} {other:.6g}; they differ "
                        f"by more than {tolerance:g}, so they train different models and their times say nothing"
                    )


def interleaved(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return what each contender returned in each repeat. In a repeat each is called once, in an
    order drawn anew."""
    dice = random.Random(SEED)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in dice.sample(list(contenders), len(contenders)):
            samples[name].append(contenders[name]())
    return samples


@dataclass(frozen=True)
class Spread:
    """The median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Figure:
    """A row of the table: a format and a kind of rows."""

    dtype: Dtype
    documents_per_row: int
    tokens_per_s: float
    peer_tokens_per_s: float
    ratio: Spread  # of tokens/s, ours over the peer's
    peak_share: Spread  # MFU of ours against the matrix product of the same repeat
    peer_peak_share: Spread
    peak_flops_per_s: float
    time_share: dict[str, float]  # of our step: forward, backward, optimizer


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def our_step(engine: Engine, batch: MicroBatch) -> Numbers:
    result = engine.step([batch], step=0, lr=LR)
    return result.loss, result.grad_norm


@contextlib.contextmanager
def open_engine(shape: Shape, dtype: Dtype, mesh: Mesh, device: torch.device) -> Iterator[Engine]:
    engine = make_engine(shape, mesh, device, dtype=dtype, zero={"stage": 0})
    try:
        yield engine
    finally:
        engine.close()


def measure(shape: Shape, dtype: Dtype, documents: int, mesh: Mesh, device: torch.device, *, repeats: int) -> Figure:
    """Return one row of the table: build both sides, check that they agree, time them in turn."""
    batch, network = shape.batch(SEED, documents=documents), shape.network()
    with open_engine(shape, dtype, mesh, device) as engine:
        ours = partial(our_step, engine, batch)
        theirs = partial(PlainLoop(engine, network, dtype=dtype, device=device).step, peer_inputs(batch, device))
        numbers = {"Triaxis": [ours() for _ in range(WARM_UP)], "transformers": [theirs() for _ in range(WARM_UP)]}
        require_agreement(f"{dtype}, documents per row {documents}", numbers, TOLERANCE[dtype])
        engine.watch.lap()
        samples = interleaved(
            {
                "ours": partial(seconds_of, ours, device),
                "theirs": partial(seconds_of, theirs, device),
                "peak": partial(measured_peak, device, dtype),
            },
            repeats,
        )
        parts_s = engine.watch.lap()
    step_flops = training_flops(network, [length for row in batch.documents.lengths for length in row])
    rates = {side: [step_flops / seconds for seconds in samples[side]] for side in ("ours", "theirs")}
    return Figure(
        dtype=dtype,
        documents_per_row=documents,
        tokens_per_s=shape.tokens / statistics.median(samples["ours"]),
        peer_tokens_per_s=shape.tokens / statistics.median(samples["theirs"]),
        ratio=Spread.of_ratios(samples["theirs"], samples["ours"]),
        peak_share=Spread.of_ratios(rates["ours"], samples["peak"]),
        peer_peak_share=Spread.of_ratios(rates["theirs"], samples["peak"]),
        peak_flops_per_s=statistics.median(samples["peak"]),
        time_share={name: seconds / sum(samples["ours"]) for name, seconds in parts_s.items()},
    )


def table_of(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title)
    for heading in ("format", "documents\na row", "Triaxis\ntokens/s", "peer\ntokens/s", "ratio\nmedian (min–max)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("Triaxis\n/ peak", "peer\n/ peak", "peak\nGFLOP/s", "forward, backward,\noptimizer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(
            figure.dtype,
            f"{figure.documents_per_row}*" if figure.documents_per_row > 1 else "1",
            f"{figure.tokens_per_s:,.0f}",
            f"{figure.peer_tokens_per_s:,.0f}",
            str(figure.ratio),
            f"{figure.peak_share.median:.0%}",
            f"{figure.peer_peak_share.median:.0%}",
            f"{figure.peak_flops_per_s / 1e9:,.0f}",
            ", ".join(f"{share:.0%}" for share in figure.time_share.values()),
        )
    if any(figure.documents_per_row > 1 for figure in figures):
        table.caption = "* the peer computes the same with an explicit block-diagonal mask [B, 1, S, S]"
    return table


def profile_of(shape: Shape, dtype: Dtype, mesh: Mesh, device: torch.device, *, rows: int = 12) -> Table:
    """Return a table of the operators in which one of our steps (whole rows) spends most of its
    time."""
    batch = shape.batch(SEED, documents=1)
    with open_engine(shape, dtype, mesh, device) as engine:
        for _ in range(WARM_UP):
            our_step(engine, batch)
        with torch.profiler.profile() as profiler:
            our_step(engine, batch)
    on_cuda = device.type == "cuda"
    times = [(e.self_device_time_total if on_cuda else e.self_cpu_time_total, e) for e in profiler.key_averages()]
    total = sum(microseconds for microseconds, _ in times)
    table = Table("operator", "calls", "ms", "share", title=f"One step of Triaxis in {dtype}: self time")
    for microseconds, event in sorted(times, key=lambda item: -item[0])[:rows]:
        table.add_row(event.key, str(event.count), f"{microseconds / 1e3:.1f}", f"{microseconds / total:.1%}")
    return table


def make_console() -> Console:
    """Return a console wide enough for the tables if nobody tells how wide it is."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=130)


def command_line(arguments: Sequence[str], description: str | None, full: Shape, quick: Shape) -> argparse.ArgumentParser:
    """Return a parser with the options that all model benchmarks share; `--quick` changes the
    defaults."""
    is_quick = "--quick" in arguments
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and 3 repeats: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON line per figure")
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE), help="formats to measure")
    parser.add_argument(
        "--repeats", type=positive, default=3 if is_quick else 7, help="paired repeats [steps]; default %(default)s"
    )
    for item in fields(Shape):
        default = getattr(quick if is_quick else full, item.name)
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, type=positive, default=default, help="default %(default)s")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(**{item.name: getattr(options, item.name) for item in fields(Shape)})


def write_json(path: Path | None, bench: str, work: Any, figures: Sequence[Any]) -> None:
    if path is None:
        return
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "time": time.time()}
    lines = [json.dumps({"bench": bench, **asdict(figure), **asdict(work), **where}) for figure in figures]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    parser = command_line(arguments, __doc__, Shape(), TINY)
    parser.add_argument("--documents", type=positive, default=3, help="documents in a packed row; default %(default)s")
    parser.add_argument("--profile", action="store_true", help="also show the operators of one step")
    options = parser.parse_args(arguments)
    shape, console = shape_of(options), make_console()
    if options.documents > shape.seq_len:
        parser.error(f"--documents {options.documents} cannot lie in a row of --seq-len {shape.seq_len} tokens")
    logging.disable(logging.INFO)  # DeepSpeed announces each of its settings
    place = ranks.Place.from_environment({})
    try:
        ranks.join(place, timedelta(minutes=30))
        mesh = Mesh.build(Layout())
        figures = []
        for dtype in options.dtypes:
            for documents in sorted({1, options.documents}):
                with console.status(f"{dtype}, documents per row: {documents}"):
                    figures.append(measure(shape, dtype, documents, mesh, place.device, repeats=options.repeats))
        console.print(table_of(figures, f"Llama: {shape}; {torch.get_num_threads()} threads, {options.repeats} repeats"))
        write_json(options.json, "single_process", shape, figures)
        for dtype in options.dtypes if options.profile else ():
            console.print(profile_of(shape, dtype, mesh, place.device))
    except UserError as error:
        console.print("\n".join(error.lines), style="red", markup=False)
        return error.exit_code
    finally:
        ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
