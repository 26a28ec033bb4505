"""The rules of a comparison: the shape of the work, Triaxis on it, the proof that two sides train
the same model, taking turns, and the options that benchmarks of models share.

A virtual machine's speed drifts by a third within minutes, so only ratios count: in each repeat
every contender takes one whole step, in an order drawn anew, and steps of the same repeat are
paired.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from plain_loop import Numbers, Update
from rich.console import Console

from parallel.documents import Documents
from parallel.mesh import Mesh
from parallel.params import initialise
from parallel.topology import Layout
from trainer.data.loader import MicroBatch
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.matmul_peak import measured_peak
from trainer.errors import UserError
from trainer.model.config import TransformerConfig
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.schema import Dtype, Recipe

SEED = 0
LR = 3e-4
OPTIMIZER = {"name": "adamw", "lr": LR}
CLIP_NORM = 1.0
PAIR = 2  # processes of the benchmarks of layouts
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


def recipe_of(
    shape: Shape,
    layout: Layout,
    *,
    dtype: Dtype,
    zero: Mapping[str, Any],
    parallel: Mapping[str, Any] | None = None,
    micro_batches: int = 1,
) -> Recipe:
    """Return the recipe of a step on `shape.micro_sequences` rows per data-parallel rank."""
    return Recipe.model_validate(
        {
            "model": {"family": "llama"},
            "data": {"seq_len": shape.seq_len},
            "batch": {
                "global_sequences": shape.micro_sequences * layout.dp,
                "micro_sequences": shape.micro_sequences // micro_batches,
            },
            "parallel": parallel or {},
            "precision": {"dtype": dtype},
            "zero": zero,
            "optimizer": OPTIMIZER,
            "train": {"clip_norm": CLIP_NORM},
        }
    )


def make_engine(shape: Shape, mesh: Mesh, device: torch.device, **work: Any) -> Engine:
    """Build Triaxis for `recipe_of` this work, started from the weights of `SEED`."""
    recipe = recipe_of(shape, mesh.layout, **work)
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


def peers_update() -> Update:
    """Return what our recipe does with gradients, for the peers to do the same."""
    keys = Recipe.model_validate({"optimizer": OPTIMIZER}).optimizer
    return Update(keys.lr, (keys.betas[0], keys.betas[1]), keys.eps, keys.weight_decay, CLIP_NORM)


def our_step(engine: Engine, batches: Sequence[MicroBatch]) -> Numbers:
    result = engine.step(batches, step=0, lr=LR)
    return result.loss, result.grad_norm


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


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_console() -> Console:
    """Return a console wide enough for the tables if nobody tells how wide it is."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def command_line(
    arguments: Sequence[str], description: str | None, full: Shape, quick: Shape, *, without: Collection[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser with the options that all model benchmarks share; `--quick` changes the
    defaults. Fields of the shape that are `without` an option keep theirs."""
    is_quick = "--quick" in arguments
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and 3 repeats: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON line per figure")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(TOLERANCE), help="formats; default: fp32, and bf16 where its products are faster"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3 if is_quick else 7, help="paired repeats [steps]; default %(default)s"
    )
    for item in fields(Shape):
        default = getattr(quick if is_quick else full, item.name)
        if item.name in without:
            parser.set_defaults(**{item.name: default})
            continue
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, type=positive, default=default, help="default %(default)s")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def formats_of(options: argparse.Namespace, device: torch.device, console: Console) -> list[Dtype]:
    """Return the formats to measure; unless told, bf16 only where this device multiplies faster in
    it, and a line says so."""
    if options.dtypes:
        return options.dtypes
    rates = {dtype: measured_peak(device, dtype) / 1e9 for dtype in TOLERANCE}
    fast = [dtype for dtype in TOLERANCE if rates[dtype] >= rates["fp32"]]
    found = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in rates.items())
    console.print(f"matrix products, GFLOP/s: {found}; measured: {', '.join(fast)}")
    return fast


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(**{item.name: getattr(options, item.name) for item in fields(Shape)})


def write_json(path: Path | None, bench: str, work: Any, figures: Sequence[Any]) -> None:
    if path is None:
        return
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "time": time.time()}
    lines = [json.dumps({"bench": bench, **asdict(work), **asdict(figure), **where}) for figure in figures]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
