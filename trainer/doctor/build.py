"""The build of DeepSpeed's extensions ahead of time, into a folder that later runs load them from.
No torch: each is compiled in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.doctor.case import Case
from trainer.doctor.compiler_lines import first_error
from trainer.doctor.looking import PROBE
from trainer.doctor.ops import OPS, RECORD, Op, lacking
from trainer.engine.extension_folder import break_stale_locks
from trainer.files.durable import make_private, write_json
from trainer.files.reading import told

LOG = "build.log"

Say = Callable[[str], None]


def build_all(case: Case, say: Say) -> bool:
    """Build the extensions that Triaxis uses and that are not built yet, and tell how it went.
    Return whether anything changed, so that it must be looked at again."""
    looked = case.seen.get("deepspeed", {})
    if "ops" not in looked:
        return False  # DeepSpeed cannot be imported, which is a finding
    wanted = [op for op in OPS if op.built and looked["accelerator"] in op.on and op.name in looked["ops"]]
    missing = [op for op in wanted if not _works(looked["ops"][op.name])]
    for op in wanted:
        if op not in missing:
            say(f"{op.name} is built already")
    for op in missing:
        if lack := lacking(op, case):
            say(f"{op.name} is not compiled: {lack}")
        else:
            _build(op, Path(looked["root"]), case, say)
    return bool(missing)


def _works(facts: dict[str, object]) -> bool:
    """Return whether there is nothing to build. What came with DeepSpeed is DeepSpeed's to mend."""
    return bool(facts["installed"] or (facts["built"] and not facts["error"]))


def _build(op: Op, root: Path, case: Case, say: Say) -> None:
    folder = root / op.name
    try:
        make_private(folder)
        for lock in [*break_stale_locks(root), *break_stale_locks(case.extensions, op.name)]:
            say(f"removed {lock}, which a killed build had left")
        say(f"{op.name}: compiling into {folder}, which takes minutes")
        start = time.monotonic()
        failed = _compiled(op.name, folder, case)
        write_json(folder / RECORD, {"failed": failed})
    except OSError as error:
        failed = f"{folder}: {told(error)}"
    say(f"{op.name}: {f'failed: {failed}' if failed else f'built in {time.monotonic() - start:.0f} s'}")


def _compiled(name: str, folder: Path, case: Case) -> str:
    """Build one extension, and return the first error of its compiler; "" for none. The whole
    output is in the folder."""
    command = [sys.executable, "-m", PROBE, "build", name]
    beside = str(Path(sys.executable).parent)  # where pip has put ninja
    environment = {**case.environment, "PATH": f"{case.environment.get('PATH', os.defpath)}{os.pathsep}{beside}"}
    with (folder / LOG).open("wb") as log:
        # A session of its own, so that its compilers can be ended with it.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:  # the user has seen enough
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code == 0:
        return ""
    return f"{first_error((folder / LOG).read_text(encoding='utf-8', errors='replace'))} ({folder / LOG})"
