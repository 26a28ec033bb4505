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
from contenders import ContenderFailed, Elsewhere
from contest import TINY, Disagreement, interleaved, require_agreement
from hugging_face_peer import hugging_face_inputs

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


def assert_one_process(figures: list[dict[str, object]], *peers: str) -> None:
    """Every contender of every comparison has figures, and one peer of each is the fastest."""
    names = ["Triaxis", "transformers", "transformers, compiled", *peers]
    for at in range(0, len(figures), len(names)):
        compared = figures[at : at + len(names)]
        assert [f["contender"] for f in compared] == names
        assert [f["is_best_peer"] for f in compared].count(True) == 1
    for figure in figures:
        for spread in ("ratio", "product_share", "peak_share"):
            assert_spread(figure[spread])
        assert figure["peak_bytes"] > 0


def test_one_process_beside_its_peers(tmp_path: Path) -> None:
    arguments = ("--quick", "--dtypes", "fp32", "--rows", "whole", "--json", str(tmp_path / "figures.jsonl"))
    done = run("bench.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no row of litgpt: it needs an environment of its own, --litgpt PYTHON" in done.stdout
    assert_one_process(figures_in(tmp_path / "figures.jsonl"))


@pytest.mark.grid
@pytest.mark.parametrize(("dtype", "lengths"), [("fp32", (32, 64)), ("bf16", (64,))])
def test_one_process_on_packed_rows_of_every_length(tmp_path: Path, dtype: str, lengths: tuple[int, ...]) -> None:
    seq_lens = ("--seq-lens", *map(str, lengths))
    arguments = ("--dtypes", dtype, *seq_lens, "--rows", "packed", "--profile", "--json", str(tmp_path / "figures.jsonl"))
    done = run("bench.py", "--quick", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aten::mm" in done.stdout
    figures = figures_in(tmp_path / "figures.jsonl")
    assert [(f["seq_len"], f["dtype"], f["documents_per_row"]) for f in figures[::3]] == [(n, dtype, 3) for n in lengths]
    assert {f["seq_len"] * f["micro_sequences"] for f in figures} == {TINY.micro_sequences * lengths[0]}
    assert_one_process(figures)


@pytest.mark.grid
@pytest.mark.skipif("LITGPT_PYTHON" not in os.environ, reason="LITGPT_PYTHON names no interpreter that has litgpt")
def test_litgpt_computes_the_same_in_whole_rows(tmp_path: Path) -> None:
    arguments = ("--rows", "whole", "--dtypes", "fp32", "bf16", "--json", str(tmp_path / "figures.jsonl"))
    done = run("bench.py", "--quick", "--litgpt", os.environ["LITGPT_PYTHON"], *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_one_process(figures_in(tmp_path / "figures.jsonl"), "litgpt")


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"  # without site-packages, as an environment that lacks the peer
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    interpreter.chmod(0o755)
    with pytest.raises(ContenderFailed, match="litgpt") as failed:
        Elsewhere("litgpt", interpreter, "litgpt_peer.py", {}, tmp_path)
    assert "No module named" in "".join(failed.value.lines)


# The contenders of each layout of two processes, beside Triaxis.
TRAINER, RESIDENT, NO_OVERLAP = "Trainer + DeepSpeed", "Triaxis without offload", "Triaxis, no overlap"
SCHEDULES = ("Triaxis, interleaved", "Triaxis, zero-bubble", "Triaxis, zbv")
TWO_PROCESSES = {
    "ZeRO-0": ("torch DDP",),
    "ZeRO-1": (TRAINER,),
    "ZeRO-2": (TRAINER, "torch FSDP2"),
    "ZeRO-3": (TRAINER, "torch FSDP2"),
    "ZeRO-2, optimizer on CPU": (TRAINER, RESIDENT),
    "ZeRO-3, all on CPU": (TRAINER, RESIDENT),
    "ZeRO-3, all on NVMe": (TRAINER, RESIDENT),
    "tensor": (NO_OVERLAP, "DTensor"),
    "tensor, no sequence": (NO_OVERLAP, "DTensor"),
    "pipeline": (*SCHEDULES, "torch pipelining", "DeepSpeed PipelineEngine"),
}


def assert_layout(tmp_path: Path, layout: str, *dtypes: str) -> None:
    """Every contender of a layout has figures that agree, and whatever offloads has a bound."""
    arguments = ("--dtypes", *dtypes, "--layouts", layout, "--json", str(tmp_path / "figures.jsonl"))
    done = run("bench_layouts.py", "--quick", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = figures_in(tmp_path / "figures.jsonl")
    assert [f["contender"] for f in figures] == ["Triaxis", *TWO_PROCESSES[layout]] * len(dtypes)
    for figure in figures:
        assert_spread(figure["ratio"])
        assert figure["peak_bytes"] > 0
        assert (figure["bytes_on_disk"] > 0) == ("NVMe" in layout and figure["contender"] != RESIDENT)
    for ours in figures[:: len(figures) // len(dtypes)]:
        if RESIDENT in TWO_PROCESSES[layout]:
            assert_spread(ours["bound"]["ratio"])
            assert ours["bound"]["moved_bytes"] > 0
        else:
            assert ours["bound"] is None


def test_two_processes_beside_their_peers(tmp_path: Path) -> None:
    assert_layout(tmp_path, "ZeRO-1", "fp32")


@pytest.mark.grid
@pytest.mark.parametrize("layout", TWO_PROCESSES)
def test_every_layout_in_every_format(tmp_path: Path, layout: str) -> None:
    assert_layout(tmp_path, layout, "fp32", "bf16")


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
    mask = hugging_face_inputs(batch, torch.device("cpu"))["attention_mask"]
    assert mask.shape == (TINY.micro_sequences, 1, TINY.seq_len, TINY.seq_len)
    for row, lengths in zip(mask[:, 0], batch.documents.lengths, strict=True):
        blocks = torch.block_diag(*[torch.ones(n, n) for n in lengths]).tril().bool()
        assert torch.equal(row, blocks)
    assert "attention_mask" not in hugging_face_inputs(TINY.batch(0, documents=1), torch.device("cpu"))
