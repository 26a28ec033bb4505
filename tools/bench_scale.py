"""The cost of scale: what one rank of 8 to 16,384 computes and holds besides its model.

    python tools/bench_scale.py --json scale.jsonl

No rank but one runs: the process group is torch's fake one, the stages lie on the meta device, and
the other ranks' reports of a save are made by arithmetic. Every save is at ZeRO-3, which cuts each
tensor over all data-parallel ranks and so makes the most fragments. A resume is planned in another
layout: half the pipeline, and half the tensor degree, or two where it was one.

Each figure is fitted over the ranks as ranks^slope; the error is the root mean square, in log2. A
slope of 0 does not grow; what a rank does must stay below 1. The slope of figures below a
millisecond is that of noise. "listed" is a manifest as earlier versions wrote it, one entry for
each fragment, where that has at most 100,000.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from parallel.mesh import Group, Mesh  # noqa: E402
from parallel.params import ShardSpec, owned_specs  # noqa: E402
from parallel.pieces import Fragment  # noqa: E402
from parallel.tensor import TensorParallel  # noqa: E402
from parallel.topology import Layout  # noqa: E402
from tools.bench import make_console  # noqa: E402
from trainer.checkpoint.geometry import overlaps  # noqa: E402
from trainer.checkpoint.manifest import LogicalTensor, Manifest  # noqa: E402
from trainer.checkpoint.report import Report, both, completed, of_rank  # noqa: E402
from trainer.checkpoint.runs import Run, joined  # noqa: E402
from trainer.model.blocks import blocks_of  # noqa: E402
from trainer.model.config import TransformerConfig  # noqa: E402
from trainer.model.hf_config import from_hf  # noqa: E402
from trainer.model.transformer import Stage  # noqa: E402
from trainer.update_rules import WEIGHT  # noqa: E402

DTYPES = dict.fromkeys((WEIGHT, "exp_avg", "exp_avg_sq"), "F32")
RANKS = (8, 64, 512, 4_096, 16_384)
MOST_LISTED = 100_000  # fragments
RECIPE = ROOT / "ds_configs" / "llama_405b_pretrain_3d.json"
CHECKED = (128, 1_024, 16_384, 131_072)


@dataclass(frozen=True)
class Model:
    """A Llama 3, and the degrees by which it is cut where there are enough ranks."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    tensor: int
    pipeline: int

    @cache  # noqa: B019 - there are three
    def network(self) -> TransformerConfig:
        hugging_face = {
            "vocab_size": 128_256,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8_192,
            "tie_word_embeddings": False,
        }
        return from_hf("llama", hugging_face)

    def layout(self, ranks: int) -> Layout:
        tensor = min(self.tensor, ranks)
        return Layout.from_world_size(ranks, tp=tensor, pp=min(self.pipeline, ranks // tensor))


MODELS = {
    "8B": Model(layers=32, hidden=4_096, ffn=14_336, heads=32, tensor=1, pipeline=1),
    "70B": Model(layers=80, hidden=8_192, ffn=28_672, heads=64, tensor=8, pipeline=1),
    "405B": Model(layers=126, hidden=16_384, ffn=53_248, heads=128, tensor=8, pipeline=16),
}


@cache
def specs_at(model: Model, layout: tuple[int, int], stage: int, place: int) -> tuple[ShardSpec, ...]:
    """Return the specs of what a rank at this stage and tensor place owns. `layout`: degrees of
    the pipeline and of the tensor group."""
    pipeline, tensor = layout
    blocks = blocks_of(model.network())
    cuts = [len(blocks) * at // pipeline for at in range(pipeline + 1)]
    built = Stage(
        model.network(),
        blocks[cuts[stage] : cuts[stage + 1]],
        dtype=torch.bfloat16,
        recompute="none",
        tp=TensorParallel(Group(place, tuple(range(tensor)), None), sequence=tensor > 1),
        device=torch.device("meta"),
        fill=lambda block: None,
    )
    return tuple(spec for _, _, spec in owned_specs(built))


def runs_of(spec: ShardSpec, data: int, held_by: range, layout: Layout, *, first_rank: int) -> Iterator[Run]:
    """Yield what the data-parallel ranks `held_by` of `data` have of a parameter at ZeRO-3, with
    ranks for files; `first_rank`: the one that is the first along the data axis."""
    share = -(-sum(piece.numel for piece in spec.pieces) // data)
    for piece in spec.pieces:
        begin = piece.row * (piece.numel // piece.rows)
        first, last = max(held_by.start, begin // share), min(held_by.stop - 1, (begin + piece.numel - 1) // share)

        def run(number: int, repeats: int = 1, begin: int = begin, piece: Any = piece) -> Run:
            start, end = max(begin, number * share), min(begin + piece.numel, (number + 1) * share)
            stride = layout.tp if repeats > 1 else 0
            return Run(first_rank + number * layout.tp, Fragment(piece, start - begin, end - start), repeats, stride)

        if first <= last:
            yield run(first)
        if last - first > 1:
            yield run(first + 1, last - first - 1)
        if last > first:
            yield run(last)


def report_of(model: Model, layout: Layout, ranks: range) -> Report:
    """Return the report that these ranks have made together, a power of two of them from a multiple
    of it on."""
    size, replica = len(ranks), layout.tp * layout.dp
    places = range(ranks.start % layout.tp, ranks.start % layout.tp + min(size, layout.tp))
    first_data = ranks.start // layout.tp % layout.dp
    held_by = range(first_data, first_data + max(1, min(size // layout.tp, layout.dp)))
    stages = range(ranks.start // replica, ranks.start // replica + max(1, size // replica))
    held: dict[str, tuple[tuple[int, ...], list[Run]]] = {}
    for stage in stages:
        for place in places:
            for spec in specs_at(model, (layout.pp, layout.tp), stage, place):
                if spec.owned:
                    for run in runs_of(spec, layout.dp, held_by, layout, first_rank=stage * replica + place):
                        piece = run.first.piece
                        held.setdefault(piece.name, (piece.shape, []))[1].append(run)
    tensors = {name: LogicalTensor(shape, DTYPES, joined(runs)).as_json() for name, (shape, runs) in held.items()}
    whole = of_rank(ranks.start, {"tensors": tensors})
    shares = (range(run.file, run.last_file + 1, run.stride or 1) for _, runs in held.values() for run in runs)
    written = sorted(set().union(*set(shares)))
    # bytes: enough for what any rank holds
    most = 12 * sum(math.prod(shape) for shape, _ in held.values())
    files = [[f"rank-{rank:05d}.safetensors", most, f"{rank:064x}"] for rank in written]
    return {**whole, "written": written, "files": files}  # type: ignore[typeddict-item]


def blank() -> Manifest:
    """Return a manifest without files and tensors, which a save completes."""
    recipe = {"model": {}, "data": {}, "precision": {"dtype": "bf16"}}
    scale = {"scale": 1.0, "good_steps": 0, "overflows_left": 2}
    return Manifest(
        step=1,
        sequences=1,
        time=0.0,
        recipe=recipe,
        facts={"batch.global_sequences": 1},
        layout={"pp": 1, "dp": 1, "cp": 1, "tp": 1, "zero": 3},
        state={"updates": 1, "loss_scale": scale, "memory": {}},
        versions={},
    )


def timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    gc.collect()  # so that it does not come in the middle
    started = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - started
    return result


def build_mesh(layout: Layout) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        Mesh.build(layout)
    finally:
        dist.destroy_process_group()


def wanted_of(model: Model, layout: Layout) -> list[Fragment]:
    """Return what the first rank must read when it goes on in this layout at ZeRO-3."""
    specs = specs_at(model, (layout.pp, layout.tp), 0, 0)
    found = [run.first for spec in specs if spec.owned for run in runs_of(spec, layout.dp, range(1), layout, first_rank=0)]
    return [fragment for fragment in found if fragment.count]


def elsewhere(layout: Layout) -> Layout:
    """Return the other layout in which a resume is planned."""
    tensor = layout.tp // 2 if layout.tp > 1 else 2
    return Layout.from_world_size(layout.world_size, tp=tensor, pp=max(1, layout.pp // 2))


def find(manifest: Manifest, wanted: Sequence[Fragment]) -> int:
    """Return how many fragments a rank reads, found as the reader does."""
    count = 0
    for fragment in wanted:
        for run in manifest.tensors[fragment.piece.name].runs:
            count += sum(any(overlaps(stored.fragment, fragment)) for stored in run.meeting(fragment))
    return count


def measure(model: Model, layout: Layout, *, listed: bool) -> dict[str, float]:
    """Return all figures of the first rank: times [s], sizes [bytes] and counts."""
    figures: dict[str, float] = {}
    timed(figures, "groups_s", lambda: build_mesh(layout))
    specs_at.cache_clear()
    timed(figures, "stage_s", lambda: specs_at(model, (layout.pp, layout.tp), 0, 0))
    own = timed(figures, "own_report_s", lambda: report_of(model, layout, range(1)))
    others = [
        json.dumps(report_of(model, layout, range(1 << level, 2 << level)))
        for level in range(layout.world_size.bit_length() - 1)
    ]
    figures["own_fragments"] = sum(len(entry[2]) for entry in own["tensors"].values())

    def merge() -> Manifest:
        report = own
        for other in others:
            report = both(report, json.loads(other))
        return completed(blank(), report)

    manifest = timed(figures, "merge_s", merge)
    figures["entries"] = sum(len(tensor.runs) for tensor in manifest.tensors.values())
    figures["fragments"] = sum(run.repeats for tensor in manifest.tensors.values() for run in tensor.runs)
    data = timed(figures, "write_s", manifest.encode)
    figures["manifest_bytes"] = len(data)
    timed(figures, "verify_s", lambda: Manifest.decode(data))
    said = json.dumps(manifest.as_json())
    tracemalloc.start()
    told = Manifest.from_json(json.loads(said))
    figures["told_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    timed(figures, "told_s", lambda: Manifest.from_json(json.loads(said)))
    wanted = wanted_of(model, elsewhere(layout))
    figures["read_fragments"] = timed(figures, "find_s", lambda: find(told, wanted))
    if listed and figures["fragments"] <= MOST_LISTED:
        figures |= measure_listed(manifest, wanted)
    return figures


def measure_listed(manifest: Manifest, wanted: Sequence[Fragment]) -> dict[str, float]:
    """Return the figures of the same manifest with an entry for each fragment."""
    figures: dict[str, float] = {}
    tensors = {
        name: replace(tensor, runs=tuple(Run(*stored) for run in tensor.runs for stored in run.stored()))
        for name, tensor in manifest.tensors.items()
    }
    whole = replace(manifest, tensors=tensors)
    data = timed(figures, "listed_write_s", whole.encode)
    figures["listed_manifest_bytes"] = len(data)
    timed(figures, "listed_verify_s", lambda: Manifest.decode(data))
    timed(figures, "listed_find_s", lambda: find(whole, wanted))
    return figures


def check_seconds(ranks: int) -> float:
    """Return how long `triaxis check` of the 405B recipe takes, the start of Python included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "trainer", "check", str(RECIPE), "--world-size", str(ranks)]
    sets = ["--set", f"batch.global_sequences={max(2_048, ranks)}"]
    subprocess.run(
        [*command, *sets], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return time.perf_counter() - started


def slope(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return (slope, error) of the line through the logarithms; see the head of this file."""
    logs = [(math.log2(ranks), math.log2(max(value, 1e-9))) for ranks, value in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else 0.0
    error = math.sqrt(sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in logs) / len(logs))
    return rise, error


MEANINGS = {
    "groups_s": "its process groups",
    "stage_s": "its stage, on the meta device",
    "own_report_s": "its fragments, and the report of them",
    "own_fragments": "its fragments",
    "merge_s": "rank 0: all reports into one",
    "fragments": "fragments of all ranks",
    "entries": "entries of them in the manifest",
    "manifest_bytes": "the manifest",
    "write_s": "rank 0: writing it",
    "verify_s": "rank 0: reading and verifying it",
    "told_s": "taking it from rank 0",
    "told_bytes": "memory for that, at most",
    "read_fragments": "fragments to read in another layout",
    "find_s": "finding them",
    "listed_manifest_bytes": "listed: the manifest",
    "listed_write_s": "listed: writing it",
    "listed_verify_s": "listed: reading it, on every rank",
    "listed_find_s": "listed: finding fragments",
}


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith("_s"):
        return f"{value * 1e3:,.1f} ms"
    return f"{value / 1e6:,.2f} MB" if name.endswith("_bytes") else f"{value:,.0f}"


def table_of(title: str, results: Mapping[int, Mapping[str, float]]) -> Table:
    table = Table(title=title)
    table.add_column("one rank computes", no_wrap=True)
    for heading in (*(f"{ranks:,}" for ranks in results), "slope", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, meaning in MEANINGS.items():
        points = [(ranks, figures[name]) for ranks, figures in results.items() if name in figures]
        fitted = [f"{number:.2f}" for number in slope(points)] if len(points) > 1 else ["–", "–"]
        if points:
            table.add_row(meaning, *(shown(name, figures.get(name)) for figures in results.values()), *fitted)
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model on few ranks: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON line per model and number of ranks")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--no-listed", action="store_true", help="leave out the manifest of earlier versions")
    options = parser.parse_args(arguments)
    console, lines = make_console(), []
    models = {"tiny": Model(4, 256, 512, 8, 2, 2)} if options.quick else {name: MODELS[name] for name in options.models}
    for name, model in models.items():
        results = {}
        for ranks in RANKS[:3] if options.quick else RANKS:
            layout = model.layout(ranks)
            with console.status(f"{name} on {ranks:,} ranks"):
                results[ranks] = measure(model, layout, listed=not options.no_listed)
            degrees = {"tensor": layout.tp, "pipeline": layout.pp, "data": layout.dp}
            lines.append({"bench": "scale", "model": name, "ranks": ranks, **degrees, **results[ranks]})
        title = f"Llama {name}: tensor {model.tensor}, pipeline {model.pipeline} where there are enough ranks, ZeRO-3 beyond"
        console.print(table_of(title, results))
    checked = {ranks: check_seconds(ranks) for ranks in (CHECKED[:1] if options.quick else CHECKED)}
    lines += [{"bench": "check", "ranks": ranks, "check_s": seconds} for ranks, seconds in checked.items()]
    said = ", ".join(f"{seconds:.2f} s for {ranks:,} ranks" for ranks, seconds in checked.items())
    console.print(f"triaxis check of the 405B recipe: {said}")
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
