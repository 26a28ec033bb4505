"""The benchmarks run and say what they promise. No time is asserted: machines differ, and this one is busy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import TINY, Disagreement, interleaved, peer_inputs, require_agreement

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def figures_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_spread(spread: object) -> None:
    assert isinstance(spread, dict)
    assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert math.isfinite(spread["high"])


@pytest.mark.grid
def test_one_process_beside_the_plain_loop(tmp_path: Path) -> None:
    done = run("bench.py", "--quick", "--profile", "--json", str(tmp_path / "figures.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ratio" in done.stdout
    assert "aten::mm" in done.stdout
    figures = figures_in(tmp_path / "figures.jsonl")
    assert [(f["dtype"], f["documents_per_row"]) for f in figures] == [("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 3)]
    for figure in figures:
        assert_spread(figure["ratio"])
        assert_spread(figure["peak_share"])


@pytest.mark.grid
def test_two_processes_beside_ddp(tmp_path: Path) -> None:
    contenders = ("torch FSDP2", "ZeRO-2", "ZeRO-3, all on CPU")
    arguments = ("--quick", "--dtypes", "bf16", "--json", str(tmp_path / "figures.jsonl"), "--contenders", *contenders)
    done = run("bench_layouts.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = figures_in(tmp_path / "figures.jsonl")
    assert [f["contender"] for f in figures] == ["torch DDP", *contenders]
    for figure in figures:
        assert_spread(figure["speed"])


@pytest.mark.grid
def test_one_device_beside_the_cpu(tmp_path: Path) -> None:
    done = run("bench_gpu.py", "--quick", "--device", "cpu", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())["facts"]
    assert {fact["part"] for fact in facts} == {"tests", "losses", "step", "attention"}
    steps = [fact for fact in facts if fact["part"] == "step"]
    assert [(fact["documents_a_row"], fact["zero"]["stage"]) for fact in steps] == [(1, 1), (8, 1), (1, 3)]
    assert all(fact["tokens_per_s"] > 0 for fact in steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_one_line() -> None:
    done = run("bench_gpu.py")
    assert done.returncode == 3
    assert "torch finds no CUDA device here" in done.stdout


def test_the_cost_of_scale(tmp_path: Path) -> None:
    """Counts, which are exact: 64 times the ranks' fragments are as many entries of the manifest."""
    done = run("bench_scale.py", "--quick", "--json", str(tmp_path / "scale.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    *scaled, checked = figures_in(tmp_path / "scale.jsonl")
    assert [figures["ranks"] for figures in scaled] == [8, 64, 512]
    _, fewer, more = scaled
    assert more["fragments"] > 7 * fewer["fragments"]
    assert more["entries"] == fewer["entries"]
    assert more["own_fragments"] <= fewer["own_fragments"]
    assert more["read_fragments"] <= fewer["read_fragments"]
    assert checked["check_s"] > 0


def test_an_extension_that_is_not_built_is_not_compiled_unasked(tmp_path: Path) -> None:
    done = run("bench_optimizers.py", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "not built" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_shape_that_cannot_be_is_one_line() -> None:
    done = run("bench.py", "--quick", "--heads", "3")
    assert done.returncode == 78
    assert "hidden_size = 64" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_contenders_that_train_different_models_are_not_compared() -> None:
    require_agreement("x", {"a": [(2.0, 1.0)], "b": [(2.0001, 1.0)]}, 1e-3)
    with pytest.raises(Disagreement, match=r"step 1: gradient norm of b is 1\.1, of a 1;"):
        require_agreement("x", {"a": [(2.0, 1.0), (2.0, 1.0)], "b": [(2.0, 1.0), (2.0, 1.1)]}, 1e-3)
    with pytest.raises(Disagreement):
        require_agreement("x", {"a": [(2.0, 1.0)], "b": [(math.nan, 1.0)]}, 1e-3)


def test_each_contender_takes_one_step_in_each_repeat_in_changing_order() -> None:
    order: list[str] = []

    def take(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleaved({"a": lambda: take("a"), "b": lambda: take("b")}, repeats=20)
    rounds = ["".join(order[at : at + 2]) for at in range(0, 40, 2)]
    assert set(rounds) == {"ab", "ba"}
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 20, "b": 20}


def test_the_peers_mask_keeps_documents_apart() -> None:
    batch = TINY.batch(0, documents=3)
    mask = peer_inputs(batch, torch.device("cpu"))["attention_mask"]
    assert mask.shape == (TINY.micro_sequences, 1, TINY.seq_len, TINY.seq_len)
    for row, lengths in zip(mask[:, 0], batch.documents.lengths, strict=True):
        blocks = torch.block_diag(*[torch.ones(n, n) for n in lengths]).tril().bool()
        assert torch.equal(row, blocks)
    assert "attention_mask" not in peer_inputs(TINY.batch(0, documents=1), torch.device("cpu"))
