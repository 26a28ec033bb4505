"""The check of DeepSpeed's compiled extensions: which are ready, what runs where they are not, and
locks that killed builds left. No torch: a process of its own has looked (`probe.py`)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.doctor.case import Case
from trainer.doctor.compiler_lines import first_error
from trainer.doctor.findings import Finding, State, absent, broken, fallback, ready
from trainer.doctor.toolchain import check_compiler, check_libaio, check_ninja
from trainer.engine.extension_folder import holder_of, is_stale, locks
from trainer.files.reading import read_json

BUILD = "triaxis doctor --build"
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps deepspeed"
RECORD = "triaxis.json"


class Op(NamedTuple):
    """An extension that Triaxis can use.

    `purpose`: what for; `instead`: what runs without it, "" where nothing does. `on`: the devices
    that have it; `built`: whether --build compiles it.
    """

    name: str
    purpose: str
    instead: str
    on: tuple[str, ...] = ("cpu", "cuda")
    built: bool = True


OPS = (
    Op("async_io", "offload to NVMe by libaio", "threads read and write the same state"),
    Op("cpu_lion", "lion with its state in host memory", ""),
    Op("fused_lion", "lion on a GPU", "", on=("cuda",)),
    Op("cpu_adam", "Adam with its state in host memory", "torch's fused Adam, which was measured no slower", built=False),
    Op("fused_adam", "Adam in one kernel", "torch's fused Adam", built=False),
    Op(
        "deepspeed_shm_comm",
        "collectives of CPU ranks in shared memory",
        "gloo, because it serves inference only",
        ("cpu",),
        False,
    ),
)


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Yield whether DeepSpeed can be imported, and the state of each extension."""
    if "error" in case.seen.get("torch", {}):
        return
    looked = case.seen.get("deepspeed", {})
    if error := looked.get("error"):
        yield broken("DeepSpeed", f"cannot be imported: {error}", "pip install --force-reinstall --no-deps deepspeed")
        return
    if not looked:
        return
    yield ready("DeepSpeed", f"{looked['version']} for {looked['accelerator']}")
    here = [op for op in OPS if looked["accelerator"] in op.on and op.name in looked["ops"]]
    obstacle = _obstacle(case)
    for op in here:
        yield _op(op, looked["ops"][op.name], Path(looked["root"]), case, obstacle)
    others = len(looked["ops"]) - len(here)
    yield absent("other extensions", f"{others} of DeepSpeed's, which Triaxis never uses")


def _obstacle(case: Case) -> Finding | None:
    """Return what keeps every extension from being compiled."""
    found = [*check_compiler(case), *check_ninja(case)]
    return next((finding for finding in found if finding.state is not State.READY), None)


def _op(op: Op, facts: Mapping[str, Any], root: Path, case: Case, obstacle: Finding | None) -> Finding:
    needed = op.name in case.needed_ops
    if facts["installed"] or facts["built"]:
        if not facts["error"]:
            return ready(op.name, f"{'came with DeepSpeed' if facts['installed'] else root / op.name}: {op.purpose}")
        fix = REINSTALL if facts["installed"] else BUILD
        return _useless(op, f"is built, and cannot be loaded: {first_error(facts['error'])}", fix, needed)
    if failed := last_failure(root, op.name):
        return _useless(op, f"could not be compiled: {failed}", BUILD, needed)
    if op.instead:
        return fallback(
            op.name,
            f"not built; for {op.purpose}: {op.instead}",
            BUILD if op.built and not _hindered(op, case, obstacle) else "",
        )
    if obstacle:
        return _useless(op, f"not built, and cannot be: {obstacle.seen.removesuffix('; fallbacks run')}", obstacle.fix, needed)
    return absent(op.name, f"not built; for {op.purpose}: compiled at first use, which takes minutes", BUILD)


def _hindered(op: Op, case: Case, obstacle: Finding | None) -> bool:
    """Return whether something must be installed before the extension can be compiled, which has
    a finding of its own."""
    return obstacle is not None or bool(lacking(op, case))


def lacking(op: Op, case: Case) -> str:
    """Return what the system lacks of which only this extension is made; "" for nothing."""
    found = [*check_libaio(case)] if op.name == "async_io" else []
    return next((finding.seen for finding in found if finding.state is not State.READY), "")


def _useless(op: Op, why: str, fix: str, needed: bool) -> Finding:
    if op.instead:
        return fallback(op.name, f"{why}; {op.instead}", fix)
    return broken(op.name, f"{why}: no {op.purpose}", fix, needed=needed)


def last_failure(root: Path, name: str) -> str:
    """Return the compiler's first error when --build last tried; "" if it never failed here."""
    try:
        return str(read_json(root / name / RECORD).get("failed", ""))
    except (OSError, ValueError):
        return ""


def check_locks(case: Case) -> Iterator[Finding]:
    """Yield the locks that builds left behind, on which every later start waits for ever."""
    for lock in locks(case.extensions):
        name, holder = lock.parent.name, holder_of(lock)
        if holder:
            yield ready("build", f"process {holder} compiles {name} ({lock})")
        elif is_stale(lock):
            yield broken(
                "stale lock",
                f"{lock}: a killed build of {name} left it, and whoever wants {name} waits for ever",
                f"rm {shlex.quote(str(lock))}",
                needed=name in case.needed_ops,
            )
