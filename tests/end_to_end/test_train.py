"""The whole program, as a user starts it: launchers, run folder, mirrors, export, errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.end_to_end.runs import STEPS, start, write_recipe
from trainer.launch.ports import held_port
from trainer.track import read_metrics

LAUNCHERS: dict[str, Callable[[int], list[str]]] = {
    "plain": lambda port: [sys.executable, "-m", "trainer"],
    "deepspeed": lambda port: [
        *("deepspeed", "--num_accelerators", "2", "--master_port", str(port), "--no_local_rank", "--module", "trainer")
    ],
    "torchrun": lambda port: [*("torchrun", "--nproc-per-node", "2", "--master-port", str(port), "-m", "trainer")],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """The same recipe under each launcher, one of them with the mirrors on."""
    done = {}
    for name, launcher in LAUNCHERS.items():
        folder = tmp_path_factory.mktemp(name)
        extra = {"tracking__tensorboard": True, "tracking__wandb": {"mode": "offline"}} if name == "deepspeed" else {}
        recipe = write_recipe(folder, **extra)
        with held_port() as port:
            done[name] = (start(*launcher(port), "train", str(recipe), cwd=folder), folder / "runs" / "small")
    return done


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_trains_to_the_end(name: str, runs: Any) -> None:
    done, folder = runs[name]
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 1.0
    wanted = ["loss", "grad_norm", "lr", "loss_scale", "tokens", "tokens_per_s", "step_time_s", "mfu", "skipped"]
    assert all(key in records[0] for key in [*wanted, "num_targets", "time"])
    parts = [records[5][f"time_{part}_s"] for part in ("data", "forward", "backward", "optimizer", "other")]
    assert math.isclose(sum(parts), records[5]["step_time_s"], rel_tol=1e-6)
    for file in ("recipe.json", "resolved.json", "evaluations.jsonl", "summary.json", "report.html", "logs/rank-00000.log"):
        assert (folder / file).is_file(), file
    assert "wandb" in os.listdir(folder) or name != "deepspeed"


def test_the_loss_does_not_depend_on_the_launcher_or_the_number_of_ranks(runs: Any) -> None:
    losses = {name: [r["loss"] for r in read_metrics(folder / "metrics.jsonl")] for name, (_, folder) in runs.items()}
    assert losses["deepspeed"] == losses["torchrun"], "same layout: bit for bit"
    # One rank sums the micro-batches' gradients in another order, which Adam magnifies: seen 2e-7 after 12 steps.
    np.testing.assert_allclose(losses["plain"][:12], losses["deepspeed"][:12], rtol=1e-5)


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "runs" / "small" / "metrics.jsonl")]


@pytest.mark.grid
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here: apt-get install openmpi-bin")
def test_mpirun_is_torchrun_to_the_bit(runs: Any, port: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    mpirun = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "trainer")
    done = start(*mpirun, "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path) == losses_of(runs["torchrun"][1].parents[1])


@pytest.mark.grid
def test_deepspeed_on_each_host_of_a_file_is_torchrun_to_the_bit(runs: Any, port: int, tmp_path: Path) -> None:
    """Two hosts of one rank; --no_ssh, so both may be this machine."""
    recipe, hosts = write_recipe(tmp_path), tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    file = ("--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1")

    def on_host(number: int) -> subprocess.CompletedProcess[str]:
        module = ("--node_rank", str(number), "--no_local_rank", "--module", "trainer", "train", str(recipe))
        return start("deepspeed", *file, "--master_port", str(port), *module, cwd=tmp_path)

    with ThreadPoolExecutor(2) as both:
        for done in both.map(on_host, (0, 1)):
            assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path) == losses_of(runs["torchrun"][1].parents[1])


def test_stdout_is_ours(runs: Any) -> None:
    """No chatter of DeepSpeed's ranks, no control characters in a log file, one line per error of every kind."""
    done, _ = runs["torchrun"]
    assert f"step {STEPS}/{STEPS}" in done.stdout
    assert "perplexity" in done.stdout
    assert "bits per byte" in done.stdout
    assert "\x1b" not in done.stdout
    assert "[INFO]" not in done.stdout
    assert "MA 0." not in done.stdout


def test_resolved_json_has_every_value_its_origin_and_the_deepspeed_dict(runs: Any) -> None:
    _, folder = runs["deepspeed"]
    resolved = json.loads((folder / "resolved.json").read_text())
    recipe = folder.parents[1] / "recipe.json"
    assert resolved["values"]["batch.global_sequences"] == {"value": 8, "origin": f"file {recipe}"}
    assert resolved["values"]["run.seed"]["origin"] == "default"
    assert resolved["deepspeed_config"]["gradient_accumulation_steps"] == 2
    assert '"auto"' not in json.dumps(resolved)


def test_the_export_loads_in_transformers_and_has_the_evaluated_loss(runs: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = runs["deepspeed"]
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert tokenizer("the fox")["input_ids"] == list(b"the fox")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_perplexity"] < summary["unigram_perplexity"], "40 steps beat the frequency of letters"
    assert model.num_parameters() == summary["num_params"]
    # The same documents, one by one, through transformers: isolated documents are what the evaluation measured.
    last = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert evaluated_by(model, folder) == pytest.approx(last["eval_loss"], rel=1e-5)
    assert last["eval_bits_per_byte"] == summary["eval_bits_per_byte"] > last["eval_loss"] / math.log(2), "ends count too"


def evaluated_by(model: torch.nn.Module, folder: Path) -> float:
    """Mean loss of a transformers model over the run's own evaluation sequences, document by document."""
    from trainer.data import prepare
    from trainer.data.loader import EvalData
    from trainer.recipe import load

    recipe = load(folder / "recipe.json").recipe
    prepared = prepare(recipe.data, seed=0, cache_dir=Path(str(recipe.data.cache_dir)), build=False, progress=lambda *_: None)
    data = EvalData(prepared.evaluation, row_tokens=64, isolate_documents=True, sequences=21)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.micro_batches(dp_rank=0, dp=1, micro_sequences=1):
            start_at = 0
            for length in batch.documents.lengths[0]:
                rows = slice(start_at, start_at + length)
                logits = model(batch.tokens_BS[:, rows]).logits[0]
                labels = batch.labels_BS[0, rows]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
                count += int((labels != -100).sum())
                start_at += length
    return total / count


def test_wandb_and_tensorboard_wrote_one_run(runs: Any) -> None:
    _, folder = runs["deepspeed"]
    assert len(list(folder.glob("wandb/**/*.wandb"))) == 1, "two ranks, one W&B run"
    assert len(list(folder.glob("tensorboard/**/events*"))) == 1


def test_generate_and_report_from_what_a_run_left(runs: Any) -> None:
    _, folder = runs["deepspeed"]
    done = start(
        *(sys.executable, "-m", "trainer", "generate", str(folder / "export"), "--prompt", "the ", "--temperature", "0"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ")
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    done = start(sys.executable, "-m", "trainer", "report", str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_bytes() == before, "the same run gives the same page"


def test_a_second_start_finds_the_run_finished(runs: Any, port: int) -> None:
    _, folder = runs["plain"]
    metrics = (folder / "metrics.jsonl").read_bytes()
    recipe = folder.parents[1] / "recipe.json"
    done = start(*LAUNCHERS["deepspeed"](port), "train", str(recipe), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"has reached step {STEPS} of {STEPS}: nothing to do") == 1
    assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.grid  # 20 s; the recipes with ZeRO-3 and offload run every day
def test_zero3_in_bf16_with_offload_continues_a_pretrained_folder(runs: Any, port: int, tmp_path: Path) -> None:
    """From a Hugging Face folder through ZeRO-3, divided and offloaded, back to one that transformers loads."""
    from transformers import AutoModelForCausalLM

    _, folder = runs["plain"]
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu, "stage3_param_persistence_threshold": 100}
    recipe = write_recipe(
        tmp_path, model__config={}, model__family=None, model__from_pretrained=str(folder / "export"), zero__stage=3
    )
    parsed = json.loads(recipe.read_text())
    del parsed["model"]["family"]
    parsed |= {"zero": zero, "precision": {"dtype": "bf16"}}
    recipe.write_text(json.dumps(parsed))
    done = start(
        *LAUNCHERS["torchrun"](port),
        "train",
        str(recipe),
        "--set",
        "train.steps=2",
        "--set",
        "train.eval_every=0",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first = read_metrics(tmp_path / "runs" / "small" / "metrics.jsonl")[0]["loss"]
    last = read_metrics(folder / "metrics.jsonl")[-1]["loss"]
    assert abs(first - last) < 0.5, "it starts where the other run ended"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "small" / "export")
    assert exported.dtype == torch.bfloat16
    assert all(p.numel() and torch.isfinite(p).all() for p in exported.parameters())


def test_a_damaged_source_ends_every_rank_with_one_line(port: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('\n{"text": broken}\n')
    done = start(*LAUNCHERS["torchrun"](port), "train", str(recipe), cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("triaxis: error:")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr
    assert "corpus.jsonl:301" in errors[0]
    plain = start(sys.executable, "-m", "trainer", "train", str(recipe), cwd=tmp_path)
    assert plain.returncode == 65


def test_the_wheel_installs_and_trains_from_an_empty_directory(tmp_path: Path) -> None:
    repository = Path(__file__).parents[2]
    source = tmp_path / "source"
    shutil.copytree(
        repository, source, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__")
    )
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], check=True, timeout=240)
    (wheel,) = wheels.glob("triaxis-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=120)
    assert sorted(p.name for p in site.iterdir() if p.is_dir() and "dist-info" not in p.name) == ["bin", "parallel", "trainer"]
    recipe = write_recipe(tmp_path)
    shutil.rmtree(source)
    done = start(
        *(sys.executable, "-m", "trainer", "train", str(recipe), "--set", "train.steps=2", "--set", "train.eval_every=0"),
        cwd=empty,
        PYTHONPATH=str(site),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = start(sys.executable, "-c", "import trainer; print(trainer.__file__)", cwd=empty, PYTHONPATH=str(site))
    assert where.stdout.startswith(str(site))
    assert (tmp_path / "runs" / "small" / "report.html").is_file()


@pytest.mark.grid  # half a minute; tests/parallel/test_auto.py trains such families every day
def test_a_family_that_is_not_ours_trains_exports_and_generates(port: int, tmp_path: Path) -> None:
    config = {"model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 4}
    model = {"model__family": "auto", "model__config": config}
    recipe = write_recipe(tmp_path, **model, zero__stage=2, train__steps=20, train__recompute="full")
    done = start(*LAUNCHERS["torchrun"](port), "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "small"
    records = read_metrics(run / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["mfu"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sample"]
    text = start(sys.executable, "-m", "trainer", "generate", str(run / "export"), "--prompt", "the ", cwd=tmp_path)
    assert text.returncode == 0, text.stderr
    # From where it stopped, on another number of ranks: the exported folder is the model.
    again = write_recipe(tmp_path, model__from_pretrained=str(run / "export"), model__family="auto", model__config={})
    options = ("--set", "train.steps=1", "--set", "run.name=again", "--set", "zero.stage=3")
    done = start(sys.executable, "-m", "trainer", "train", str(again), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first = read_metrics(tmp_path / "runs" / "again" / "metrics.jsonl")[0]
    assert abs(first["loss"] - records[-1]["loss"]) < 0.5
