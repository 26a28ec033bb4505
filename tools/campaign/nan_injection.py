"""NaN and infinity injected into runs: skipped on every rank, nothing changed, the cause named.

    python -m tools.campaign.nan_injection --injections 500

Every rank must skip the same steps, no weight or moment may change by a bit, and what was poisoned
must be named, with its rank and its sequences.

One run takes many injections, at steps drawn beforehand: into the loss, one element of a gradient,
or a row of a module's output, on one rank and in one micro-batch. fp16 is computed by the CPU
itself, not emulated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.campaign.cases import WAYS, Way, arguments, report, write_recipe
from tools.campaign.ranks import run_ranks, train
from trainer.track import read_metrics

KINDS = ("loss", "gradient", "output")
BAD_VALUES = (math.nan, math.inf, -math.inf)
GLOBAL_SEQUENCES, MICRO_SEQUENCES = 8, 2  # of `write_recipe`


def draw(way: Way, steps: int, count: int, stream: random.Random) -> dict[int, dict[str, Any]]:
    """Return, for each chosen step, what is put where."""
    return {
        step: {
            "kind": stream.choice(KINDS),
            "rank": stream.randrange(way.processes),
            "micro_batch": stream.random(),
            "seed": stream.randrange(2**32),
        }
        for step in sorted(stream.sample(range(steps), count))
    }


def train_poisoned(plan: Mapping[int, Mapping[str, Any]], log: str, command: Sequence[str]) -> int:
    """Run `train` on this rank with the injections, and write what happened to a file of this
    rank."""
    import trainer.guard.guard
    import trainer.guard.inspector
    from trainer.engine.engine import Engine

    told: dict[int, dict[str, Any]] = {}
    gradients, judge, find = Engine._gradients, trainer.guard.guard.Guard.judge, trainer.guard.inspector.find_culprit
    before: dict[int, str] = {}

    def poisoned(engine: Engine, micro_batches: Sequence[Any], step: int, scale: float) -> Any:
        if step not in before:  # otherwise this is the replay
            before[step] = state_of(engine)
        injection = plan.get(step)
        if injection is None:
            return gradients(engine, micro_batches, step, scale)
        with put(engine, injection) as target:
            result = gradients(engine, micro_batches, step, scale)
        told.setdefault(step, {}).update(target)
        return result

    def judged(guard: Any, step: int, lr: float, result: Any, micro_batches: Any) -> None:
        judge(guard, step, lr, result, micro_batches)
        unchanged = before[step] == state_of(guard._inspector._engine)
        told.setdefault(step, {}).update(skipped=result.skipped, unchanged=unchanged)

    def found(*args: Any, **keys: Any) -> Any:
        culprit = find(*args, **keys)
        told.setdefault(keys["step"], {}).update(
            named=culprit and [culprit.what, list(culprit.ranks), culprit.micro_batch],
        )
        return culprit

    Engine._gradients = poisoned
    trainer.guard.guard.Guard.judge = judged
    trainer.guard.inspector.find_culprit = found
    code = train(command)
    Path(log, f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
    return code


def state_of(engine: Any) -> str:
    """Return the SHA-256 of this rank's held weights, fp32 weights and moments."""
    digest = hashlib.sha256()
    held = (getattr(parameter, "ds_tensor", parameter).detach() for parameter, _ in engine.specs)
    for tensor in (*held, *engine.state.tensors()):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def put(engine: Any, injection: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Poison a step on the injection's rank, and put what must be named into the yielded dict of
    that rank."""
    from trainer.guard.culprit import before_other_hooks, culprit_piece

    target: dict[str, Any] = {}
    if engine.mesh.rank != injection["rank"]:
        yield target
        return
    stream = random.Random(injection["seed"])
    value = stream.choice(BAD_VALUES)
    module = engine.execution.module
    stages = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    micro_batch = int(injection["micro_batch"] * engine.plan.num_micro_batches)
    calls = [0]

    def this_time() -> bool:
        calls[0] += 1
        return calls[0] - 1 == micro_batch

    kind = injection["kind"]
    heads = [stage for stage in stages if getattr(stage, "head", None) is not None]
    if kind == "loss" and not heads:
        kind = "output"
    with ExitStack() as hooks:
        if kind == "gradient":
            parameter, spec = stream.choice([(p, s) for p, s in engine.specs if not (s.tied and s.copies.size == 1)])

            def spoil(grad: Tensor) -> Tensor:
                if not this_time():
                    return grad
                grad = grad.clone()
                rows = sum(piece.rows for piece in spec.pieces)  # the rest is padding
                place = stream_of_element.randrange(grad[:rows].numel())
                grad.view(-1)[place] = value
                target.update(what=f"gradient of {culprit_piece(spec, grad)}")
                return grad

            stream_of_element = random.Random(injection["seed"])
            handle = before_other_hooks(parameter, spoil)
        else:
            forwards = [0]

            def count(module: nn.Module, inputs: Any) -> None:
                forwards[0] += 1

            def poison(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                # A recomputation in backward is poisoned again.
                factor = torch.ones_like(output)
                if forwards[0] - 1 == micro_batch:  # a row: dropout may take a single element away
                    (factor[0] if factor.dim() else factor).fill_(math.nan)
                return output * factor

            chosen = heads[0].head.output if kind == "loss" else stream.choice(_with_outputs(stages))
            path, stage = next((path, s) for s in stages for path, module in s.named_modules() if module is chosen)
            target.update(what="loss" if kind == "loss" else f"({path})")
            hooks.callback(stage.register_forward_pre_hook(count).remove)
            handle = chosen.register_forward_hook(poison, prepend=True)
        hooks.callback(handle.remove)
        target.update(kind=kind, rank=injection["rank"], micro_batch=micro_batch)
        yield target


def _with_outputs(stages: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules with weights of their own, called once for each micro-batch; not the head,
    whose output is the loss."""
    from parallel.params import Sharded

    return [
        module
        for stage in stages
        for path, module in stage.named_modules()
        if isinstance(module, Sharded) and module.specs and path != "head.output"
    ]


def verdict(told: Sequence[Mapping[str, Any]], plan: Mapping[int, Any], steps: int, skipped: int) -> dict[int, str]:
    """Return why each failing step fails."""
    failures: dict[int, str] = {}
    if skipped != len(plan):
        failures[-1] = f"metrics count {skipped} skipped steps, {len(plan)} were poisoned"
    for step in range(steps):
        of_ranks = [rank.get(str(step), {}) for rank in told]
        expected = step in plan
        if [rank.get("skipped") for rank in of_ranks] != [expected] * len(of_ranks):
            failures[step] = f"skipped: {[rank.get('skipped') for rank in of_ranks]}, expected {expected} on all"
        elif expected and not all(rank["unchanged"] for rank in of_ranks):
            failures[step] = f"state unchanged: {[rank['unchanged'] for rank in of_ranks]}"
        elif expected:
            target = next(rank for rank in of_ranks if "what" in rank)
            what, ranks, micro_batch = of_ranks[0]["named"] or ("nothing", [], None)
            if not (target["what"] in what and ranks == [target["rank"]] and micro_batch == target["micro_batch"]):
                wanted = {key: target[key] for key in ("what", "rank", "micro_batch")}
                failures[step] = f"named {[what, ranks, micro_batch]}, poisoned {wanted}"
    return failures


def run(way: Way, dtype: str, steps: int, count: int, seed: int, folder: Path, **more: Any) -> tuple[int, dict[int, str]]:
    """Return (injections, failures by step) of one run."""
    stream = random.Random(f"{seed} {way.name} {dtype}")
    precision = {"dtype": dtype, **({"loss_scale": {"initial_power": 4}} if dtype == "fp16" else {})}
    recipe = write_recipe(folder, steps=steps, every=0, keep=1, precision=precision, guard={"max_skipped": 0}, **more)
    plan = draw(way, steps, count, stream)
    log = folder / "log"
    command = arguments(recipe, folder / "run", way)
    ended = run_ranks(train_poisoned, plan, str(log), command, world_size=way.processes, log=log)
    if any(ended.codes):
        return count, dict.fromkeys(plan, f"ended with {ended.codes}: {ended.said[-600:]}")
    told = [json.loads((log / f"told-{rank}.json").read_text()) for rank in range(way.processes)]
    skipped = int(read_metrics(folder / "run" / "metrics.jsonl")[-1]["skipped"] or 0)
    return count, verdict(told, plan, steps, skipped)


def campaign(injections: int, per_run: int, seed: int, names: Sequence[str], dtypes: Sequence[str]) -> tuple[int, int]:
    """Return (passed, all)."""
    combinations = [(way, dtype) for way in WAYS if way.name in names for dtype in dtypes]
    passed = total = runs = 0
    with tempfile.TemporaryDirectory(prefix="triaxis-nan-") as scratch:
        while total < injections:
            way, dtype = combinations[runs % len(combinations)]
            folder = Path(scratch) / str(runs)
            count, failures = run(way, dtype, per_run + 3, per_run, seed + runs, folder)
            for step, reason in failures.items():
                report(
                    campaign="nan_injection", run=runs, seed=seed + runs, layout=way.name, dtype=dtype, step=step, reason=reason
                )
            total += count
            passed += count - len(failures)
            runs += 1
            shutil.rmtree(folder, ignore_errors=True)
    report(campaign="nan_injection", seed=seed, passed=passed, n=total, runs=runs)
    return passed, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--injections", type=int, default=500, help="at least so many")
    parser.add_argument("--per-run", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=[way.name for way in WAYS])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16", "fp16"])
    options = parser.parse_args()
    passed, total = campaign(options.injections, options.per_run, options.seed, options.layouts, options.dtypes)
    return int(passed < total)


if __name__ == "__main__":
    raise SystemExit(main())
