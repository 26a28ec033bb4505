"""Validate the planner on this machine: the steps and the host memory of real runs, next to what is
predicted from `triaxis doctor --measure` alone.

    python -m tools.validate_here                      print the table
    python -m tools.validate_here --json FILE          write it too
    python -m tools.validate_here --quick              one recipe, a few steps

Every run is a `triaxis train` of its own, with one thread for each rank; its step times and memory
are read from its metrics. Nothing is fitted on them. Other work on the machine makes steps longer,
and so it does matrix products: a short probe of products as in the sheet runs
before and after each run, and the prediction is multiplied by how much slower these were. Where
they differ, the machine changed during the run, and it is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.commands.network import known_network
from trainer.errors import UserError
from trainer.files.paths import here_sheet
from trainer.files.reading import read_json
from trainer.launch.ports import held_port
from trainer.planner.devices import HERE, Device, device
from trainer.planner.items import Place
from trainer.planner.prediction import predict
from trainer.recipe import load

STEPS, WARM_UP = 12, 4
STEADY = 0.08  # probes before and after a run that differ by less saw the same machine
TRIES = 2
TEXT = "the quick brown fox jumps over the lazy dog while the cat looks on and says nothing at all. "

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
MIDDLE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
WIDE = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 4, "num_attention_heads": 10}
GPT = {"n_embd": 384, "n_layer": 4, "n_head": 6, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

ON_CPU, ON_NVME = {"device": "cpu"}, {"device": "nvme"}


@dataclass(frozen=True)
class Case:
    """A recipe, by what it changes, and its ranks. The steps of more ranks than cores are not
    compared: they wait for each other's turns."""

    name: str
    ranks: int
    config: Mapping[str, Any]
    family: str = "llama"
    length: int = 256
    sequences: tuple[int, int] = (8, 8)  # of a step, and of a micro-batch
    symbols: int = 4096
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def recipe(self, folder: Path, steps: int = STEPS) -> dict[str, Any]:
        given: dict[str, Any] = {
            "run": {"name": "run", "dir": str(folder)},
            "model": {"family": self.family, "config": {**self.config, "vocab_size": self.symbols}},
            "data": {
                "sources": [{"path": str(folder / "corpus.jsonl")}],
                "tokenizer": "bytes",
                "seq_len": self.length,
            },
            "batch": {"global_sequences": self.sequences[0], "micro_sequences": self.sequences[1]},
            "precision": {"dtype": "fp32"},
            "train": {"steps": steps, "log_every": 1},
            "checkpoint": {"every": 0},
        }
        for section, keys in self.changes.items():
            given.setdefault(section, {}).update(keys)
        for key, value in given.get("zero", {}).items():
            if value == ON_NVME:
                given["zero"][key] = {**value, "nvme_path": str(folder / "swap")}
        return given


def zero(stage: int, optimizer: Mapping[str, Any] | None = None, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
    keys: dict[str, Any] = {"stage": stage}
    keys |= {"offload_optimizer": optimizer} if optimizer else {}
    keys |= {"offload_param": weights} if weights else {}
    return {"zero": keys}


BF16 = {"precision": {"dtype": "bf16"}}
CASES = (
    Case("ZeRO-0, small", 1, SMALL, sequences=(8, 8)),
    Case("ZeRO-0, wide, recomputed", 1, WIDE, sequences=(4, 4), changes={"train": {"recompute": "full"}}),
    Case("ZeRO-0, GPT-2, 4 micro-batches", 1, GPT, family="gpt2", sequences=(8, 2)),
    Case("ZeRO-1, middle", 1, MIDDLE, sequences=(8, 4), changes=zero(1)),
    Case("ZeRO-2, optimizer on CPU", 1, WIDE, sequences=(4, 4), changes=zero(2, ON_CPU)),
    Case("ZeRO-3, all on CPU", 1, MIDDLE, sequences=(8, 8), changes=zero(3, ON_CPU, ON_CPU)),
    Case("ZeRO-3, all on NVMe", 1, WIDE, sequences=(4, 4), changes=zero(3, ON_NVME, ON_NVME)),
    Case("ZeRO-0 in bf16", 1, WIDE, sequences=(8, 8), changes=BF16),
    Case("ZeRO-2 in bf16", 1, MIDDLE, sequences=(8, 8), changes={**zero(2), **BF16}),
    Case("ZeRO-0, 2 data-parallel", 2, MIDDLE, sequences=(8, 4)),
    Case("ZeRO-1, 2 data-parallel", 2, SMALL, sequences=(16, 8), changes=zero(1)),
    Case("ZeRO-2, 2 data-parallel", 2, MIDDLE, sequences=(8, 2), changes=zero(2)),
    Case("ZeRO-3, 2 data-parallel", 2, WIDE, sequences=(8, 4), changes=zero(3)),
    Case("tensor 2", 2, MIDDLE, sequences=(8, 8), changes={"parallel": {"tensor": 2}}),
    Case(
        "tensor 2, tokens whole",
        2,
        WIDE,
        sequences=(4, 4),
        changes={"parallel": {"tensor": 2, "sequence_parallel": False}},
    ),
    Case("pipeline 2, 1F1B, 8 micro-batches", 2, MIDDLE, sequences=(8, 1), changes={"parallel": {"pipeline": 2}}),
    Case(
        "pipeline 2, zero-bubble, ZeRO-1",
        2,
        WIDE,
        sequences=(8, 1),
        changes={"parallel": {"pipeline": 2, "schedule": "interleaved_zero_bubble"}, **zero(1)},
    ),
)
CROWDED = (
    Case("ZeRO-3, 4 data-parallel", 4, MIDDLE, sequences=(16, 4), changes=zero(3)),
    Case(
        "tensor 2, pipeline 2, ZeRO-1", 4, WIDE, sequences=(8, 2), changes={"parallel": {"tensor": 2, "pipeline": 2}, **zero(1)}
    ),
)
QUICK = Case("ZeRO-0, tiny", 1, {**SMALL, "num_hidden_layers": 2}, length=64, sequences=(2, 2), symbols=512)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe's step [s] and the most host memory of a rank [bytes], as predicted and as measured.
    `slower`: than in the sheet, by the probe, which the prediction has in it."""

    name: str
    ranks: int
    predicted_s: float
    measured_s: float
    slower: float
    predicted_bytes: int
    measured_bytes: int
    timed: bool = True

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def validated(case: Case, on: Device, folder: Path, steps: int = STEPS) -> Row:
    """Run a case until the machine was the same before and after it, a few times at most."""
    documents = (json.dumps({"text": TEXT * (1 + i % 5) + str(i)}) for i in range(300))
    (folder / "corpus.jsonl").write_text("\n".join(documents), encoding="utf-8")
    path = folder / "recipe.json"
    path.write_text(json.dumps(case.recipe(folder, steps)), encoding="utf-8")
    before = probe(on, case.ranks)
    for _ in range(TRIES):
        records = trained(path, case.ranks, folder / "run")
        after = probe(on, case.ranks)
        if case in CROWDED or abs(after / before - 1) < STEADY:
            break
        before = after
    resolved = load(path, [])
    network = known_network(resolved)
    assert network is not None
    planned = predict(resolved.recipe, network, case.ranks, on, on_gpu=False)
    assert planned.time is not None
    slower = (before + after) / 2
    first = planned.ranks[0]  # whose memory the metrics have
    held = first.peak(Place.HOST) + first.peak(Place.DEVICE)
    settled = records[min(WARM_UP, len(records) - 1) :]
    return Row(
        name=case.name,
        ranks=case.ranks,
        predicted_s=slower * planned.time.total,
        measured_s=statistics.median(float(record["step_time_s"]) for record in settled),
        slower=slower,
        predicted_bytes=held,
        measured_bytes=int(max(float(record["memory_gib"]) for record in records) * 2**30),
        timed=case not in CROWDED,
    )


def trained(path: Path, ranks: int, run: Path) -> list[dict[str, Any]]:
    """Return the records of a run of this recipe."""
    command = [sys.executable, "-m", "trainer", "train", str(path), "--resume", "never"]
    given = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**given, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if run.exists():
        subprocess.run(["rm", "-r", str(run)], check=True)
    with held_port() as port:
        places = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in range(ranks)
        ]
        started = [
            subprocess.Popen(
                command, env=environment | (place if ranks > 1 else {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for place in places
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError(f"{path}: a run failed: {said[0].decode()[-2000:]}")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------- the machine


def probe(on: Device, ranks: int) -> float:
    """Return how much longer a product takes now than in the sheet, while so many do one."""
    command = [sys.executable, "-m", "tools.validate_here", "--probe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    seconds = [float(process.communicate()[0]) for process in started]
    speed = on.shared_by(ranks).speed
    assert speed is not None
    return statistics.mean(seconds) / speed.steady


# ---------------------------------------------------------------------------- the table


def lines_of(path: Path) -> list[str]:
    """Return the guide's tables of a file that this tool has written; [] if it is not there."""
    if not path.exists():
        return []
    told = read_json(path)
    return [*lines([Row(**row) for row in told["rows"]], told["machine"]), ""]


def lines(rows: Sequence[Row], machine: str) -> Iterator[str]:
    """Yield the tables of the guide."""
    yield "| recipe | ranks | step predicted [ms] | measured [ms] | error | memory predicted [MiB] | measured [MiB] | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        steps = f"{1e3 * row.predicted_s:.0f} | {1e3 * row.measured_s:.0f} | {_signed(row.error)}" if row.timed else "  |  | "
        memory = f"{row.predicted_bytes / 2**20:.0f} | {row.measured_bytes / 2**20:.0f} | {_signed(row.memory_error)}"
        yield f"| {row.name} | {row.ranks} | {steps} | {memory} |"
    yield ""
    yield f"| on {machine} | mean error | largest | signed |"
    yield "|---|---|---|---|"
    for what, errors in (
        ("time of a step", [row.error for row in rows if row.timed]),
        ("host memory of a rank", [row.memory_error for row in rows]),
    ):
        sizes = [abs(error) for error in errors]
        yield f"| {what} | {statistics.mean(sizes):.1%} | {max(sizes):.1%} | {_signed(statistics.mean(errors))} |"


def _signed(share: float) -> str:
    return f"{share:+.1%}".replace("-", "−")


def _machine() -> str:
    """Return the machine that was measured, as its sheet names it."""
    measured = read_json(here_sheet(os.environ))["measured"]["machine"]
    return f"{measured['device']}, {measured['host_cores']} cores, torch {measured['torch']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are written")
    parser.add_argument("--quick", action="store_true", help="one small recipe and a few steps")
    parser.add_argument("--only", metavar="TEXT", default="", help="the recipes that have this in their names")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        from trainer.doctor.rank_speed import steady_times

        print(statistics.mean(steady_times()))
        return 0
    try:
        on = device(HERE)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    cases = [QUICK] if arguments.quick else [case for case in (*CASES, *CROWDED) if arguments.only in case.name]
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(validated(case, on, Path(folder), 6 if arguments.quick else STEPS))
        row = rows[-1]
        print(f"{row.name}: {row.predicted_s:.3f} s, measured {row.measured_s:.3f} s, {row.error:+.1%}", file=sys.stderr)
    print("\n".join(lines(rows, _machine())))
    if arguments.json:
        told = {"machine": _machine(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
