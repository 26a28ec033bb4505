"""The cost of checkpoints: time and memory of saving, verifying, loading and exporting.

    python tools/bench_checkpoints.py --layers 12 --hidden 768   # GPT-2 of 124 M, AdamW: 1.5 GB

Saving is measured against the disk's own rate, with the share that training waits for. Memory is
what each step takes beyond what is there before. There is one process. Times are ratios to writing
and syncing the same number of bytes in the same minute, because disks drift.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return (result, seconds, MiB of resident memory above the start at the worst moment)."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before, started = _status("VmRSS"), time.perf_counter()
    result = work()
    return result, time.perf_counter() - started, (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Return a value of /proc/self/status [KiB]."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def raw_write(folder: Path, num_bytes: int) -> float:
    """Return the seconds that it takes to write and sync `num_bytes`, 16 MiB at a time."""
    block = os.urandom(16 << 20)
    started = time.perf_counter()
    with (folder / "raw").open("wb", buffering=0) as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "raw").unlink()
    return seconds


def write_recipe(folder: Path, layers: int, hidden: int) -> Path:
    from tools.campaign import cases

    model = {"config": {"n_embd": hidden, "n_layer": layers, "n_head": hidden // 64, "n_positions": 32, "vocab_size": 50257}}
    return cases.write_recipe(
        folder, steps=4, every=0, keep=9, model=model, batch={"global_sequences": 1, "micro_sequences": 1}
    )


def bench(folder: Path, layers: int, hidden: int) -> None:
    from parallel.messages import Messages
    from trainer.checkpoint.check import check_files
    from trainer.checkpoint.folder import CheckpointFolder
    from trainer.checkpoint.manifest import Manifest
    from trainer.checkpoint.resume import CheckpointSource, Found
    from trainer.checkpoint.resume_check import Resume
    from trainer.checkpoint.save import Saver
    from trainer.recipe import load
    from trainer.run.session import open_session

    recipe = write_recipe(folder, layers, hidden)
    with open_session(load(recipe), str(folder / "run"), Resume()) as run:
        for step in range(2):
            _, step_s, _ = measured(lambda step=step: run.engine.step(run.data.micro_batches(step), step=step, lr=1e-3))
        checkpoints = CheckpointFolder(folder / "saved")
        manifest = Manifest(
            step=1, sequences=1, time=0.0, recipe=run.recipe.model_dump(mode="json"), facts={},
            layout={**asdict(run.engine.mesh.layout), "zero": 0}, versions={},
            state={"updates": 1, "loss_scale": run.engine.scaler.state(), "memory": {}},
        )  # fmt: skip
        rows: list[tuple[str, float, float]] = []
        sync = Saver(checkpoints, Messages.alone(), keep=9, asynchronous=False)
        (saved,), seconds, peak = measured(lambda: sync.save(manifest, run.engine.state, save_beside=run.files.save))
        num_bytes = saved.num_bytes
        raw_s = raw_write(folder, num_bytes)
        rows.append(("save, waited for", seconds, peak))
        behind = Saver(checkpoints, Messages.alone(), keep=9, asynchronous=True)
        second = replace(manifest, step=2)
        _, blocked_s, peak = measured(lambda: behind.save(second, run.engine.state, save_beside=run.files.save))
        rows.append(("save, async: training waits", blocked_s, peak))
        rows.append(("… until it is on the disk", behind.wait()[0].total_s, peak))
        path = checkpoints.of_step(1)
        read, seconds, peak = measured(lambda: Manifest.read(path))
        rows.append(("read the manifest", seconds, peak))
        _, seconds, peak = measured(lambda: check_files(path, read.files))
        rows.append(("verify every byte", seconds, peak))
        source = CheckpointSource(Found(path, read), states=("exp_avg", "exp_avg_sq"))
        _, seconds, peak = measured(lambda: run.engine.state.restore(source, updates=2))
        rows.append(("set all tensors from it", seconds, peak))
        largest = max(tensor.numel * 4 for tensor in read.tensors.values())
    print(f"{num_bytes / 1e9:.2f} GB, {len(read.tensors)} tensors, the largest {largest / 2**20:.0f} MiB")
    print(f"write and sync the same bytes: {raw_s:.2f} s, {num_bytes / raw_s / 1e9:.2f} GB/s; a step: {step_s:.2f} s")
    for name, seconds, peak in rows:
        print(f"{name:32}{seconds:8.2f} s {seconds / raw_s:6.2f} × raw   +{peak:7.0f} MiB")
    export(path, folder / "hf", raw_s)


EXPORT = """
import sys
from pathlib import Path
from trainer.cli import main
code = main(["export", *sys.argv[1:]])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


def export(checkpoint: Path, out: Path, raw_s: float) -> None:
    """Export in a process of its own, whose whole memory counts."""
    started = time.perf_counter()
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seconds, peak = time.perf_counter() - started, int(done.stdout.split()[-1]) / 1024
    print(f"{'export, start of Python included':32}{seconds:8.2f} s {seconds / raw_s:6.2f} × raw    {peak:7.0f} MiB in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="triaxis-bench-", dir=options.folder))
    try:
        bench(folder, options.layers, options.hidden)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
