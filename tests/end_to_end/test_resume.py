"""Going on, as a user meets it: killed runs, refusals, damaged checkpoints, and the commands that look at them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import WAYS, Way, arguments, digests, numbers, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.manifest import MANIFEST
from trainer.cli import main
from trainer.cluster.lease import HOLDER, WANTED, JobStart, leased
from trainer.run.step_data import StepData
from trainer.track.goodput import read_starts, shares_of

ROOT = str(Path(__file__).parents[2])
ONE = WAYS[0]
ZERO1 = next(way for way in WAYS if way.name == "dp2-zero1")


def run(recipe: Path, run_dir: Path, *words: str, way: Way = ONE, resume: str = "auto") -> Ended:
    command = [*arguments(recipe, run_dir, way, resume=resume), *words]
    return run_ranks(train, command, world_size=way.processes, log=run_dir.parent / "log")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a run of it: 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("done")
    recipe = write_recipe(folder, steps=6, every=2, keep=9)
    ended = run(recipe, folder / "run", way=ZERO1)
    assert ended.codes == (0, 0), ended.said
    return recipe, folder / "run"


@pytest.fixture
def copy(done: tuple[Path, Path], tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(done[1], tmp_path / "run"))


@pytest.mark.grid  # half a minute; the slices of the campaigns kill ranks every day
def test_killed_under_torchrun_and_started_again(port: int, tmp_path: Path) -> None:
    """kill -9 of everything in the middle; the same command again ends with the record of a run that nobody killed."""
    constant = {"schedule": {"name": "constant", "warmup_steps": 4}, "checkpoint": {"async": True}}
    recipe = write_recipe(tmp_path, steps=1_000_000, every=5, keep=2, **constant)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    first = torchrun(port, recipe, killed)
    try:
        deadline = time.monotonic() + 100
        while steps_logged(killed) < 13 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        for pid in (first.pid, *children(first.pid)):  # torchrun gives each rank a session of its own
            os.kill(pid, signal.SIGKILL)
        first.communicate()
    steps = steps_logged(killed) + 10
    assert steps >= 23, "the run was not killed in its middle"
    second = torchrun(port, recipe, killed, "--set", f"train.steps={steps}")
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert "resumed after step" in said
    assert run(recipe, undisturbed, "--set", f"train.steps={steps}", way=ZERO1).codes == (0, 0)
    assert numbers(killed) == numbers(undisturbed)
    end = Path("checkpoints") / f"step-{steps:08d}"
    assert digests(killed / end) == digests(undisturbed / end)
    shares, starts = shares_of(read_starts(killed)), read_starts(killed)
    assert [start["to_step"] for start in starts][1:] == [steps], "what was before the kill stays written"
    assert shares["explained"] >= 0.97, shares
    assert shares["communication"] > 0.0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_logged(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def torchrun(port: int, recipe: Path, run_dir: Path, *words: str) -> subprocess.Popen[str]:
    command = [
        *("torchrun", "--nproc-per-node", "2", "--master-port", str(port), "-m", "trainer", "train"),
        *arguments(recipe, run_dir, ZERO1),
        *words,
    ]
    return subprocess.Popen(
        command,
        cwd=run_dir.parent,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("way", [ONE, ZERO1], ids=lambda way: way.name)
def test_a_signal_on_one_rank_saves_the_same_step_on_all(way: Way, tmp_path: Path) -> None:
    """Sent again and again from when the ranks can hear it: at the end of a step they save, once."""
    recipe = write_recipe(tmp_path, steps=1_000_000, every=1000, keep=2, schedule={"name": "constant", "warmup_steps": 4})
    run_dir = tmp_path / "run"

    def send(pids: list[int]) -> None:
        deadline = time.monotonic() + 60
        while steps_logged(run_dir) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(3):
            os.kill(pids[-1], signal.SIGUSR1)

    command = arguments(recipe, run_dir, way)
    ended = run_ranks(train, command, world_size=way.processes, log=tmp_path / "log", around=send)
    assert ended.codes == (75,) * way.processes, ended.said
    steps = steps_logged(run_dir)
    assert f"SIGUSR1: ended after step {steps}; the same command goes on after step {steps}" in ended.said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert json.loads((run_dir / "summary.json").read_text())["ended_by"] == "SIGUSR1"


def started(*command: str, cwd: Path) -> subprocess.Popen[str]:
    """`triaxis train` in a process of its own; what it says on stderr is kept."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("phase", ["training the tokenizer", pytest.param("tokenizing", marks=pytest.mark.grid)])
def test_a_signal_before_the_first_step_ends_the_run_at_once(phase: str, tmp_path: Path) -> None:
    """While a corpus of a minute's work is read. What is tokenized is kept."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(100_000)]
    (tmp_path / "corpus.txt").write_text(" ".join(letters.choices(words, k=2_000_000)))
    tokenizer = "bpe:30000" if phase == "training the tokenizer" else "bytes"
    data = {"sources": [{"path": "corpus.txt"}], "tokenizer": tokenizer, "seq_len": 32}
    if phase == "tokenizing":
        rows = (json.dumps({"prompt": "x", "completion": word}) for word in words)
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        data |= {"sources": [{"path": "rows.jsonl"}], "task": "sft"}
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    (tmp_path / "recipe.json").write_text(json.dumps({"model": {"family": "gpt2", "config": config}, "data": data}))
    process = started("recipe.json", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not list((tmp_path / "runs" / "data").glob("*.building")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert error.strip().splitlines()[-1] == "triaxis: error: SIGTERM: ended before the first step; start the run again"
    assert list((tmp_path / "runs" / "data").glob("*.building")), "the data were built to their end"


def test_a_second_ctrl_c_changes_nothing(tmp_path: Path) -> None:
    """Half a second after the first, while the interpreter ends."""
    recipe = write_recipe(tmp_path, steps=1_000_000, every=1_000_000, keep=1)
    process = started(*arguments(recipe, tmp_path / "run", ONE), cwd=tmp_path)
    try:
        deadline = time.monotonic() + 100
        while steps_logged(tmp_path / "run") < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.communicate()[1] == ""
    assert process.returncode == 75


def test_a_checkpoint_that_was_moved_to_another_disk_and_linked_back_is_gone_on_from(
    done: tuple[Path, Path], copy: Path, tmp_path: Path
) -> None:
    checkpoints = copy / "checkpoints"
    for step in checkpoints.glob("step-*"):
        shutil.move(step, tmp_path / step.name)
        step.symlink_to(tmp_path / step.name)
    ended = run(done[0], copy, "--set", "train.steps=7", way=ZERO1)
    assert ended.codes == (0, 0), ended.said
    assert [record[0] for record in numbers(copy)] == list(range(1, 8)), "its history goes on"
    for step in checkpoints.glob("step-*"):
        if step.is_symlink():
            step.unlink()
            step.symlink_to(tmp_path / "not mounted")
    refused = run(done[0], copy, "--set", "train.steps=8", way=ZERO1)
    assert max(refused.codes) == 65, refused.said
    assert "it has a checkpoint's name and is a link to what is not there: is its disk mounted?" in refused.said


def test_a_run_does_not_begin_again_beside_what_may_be_its_checkpoints(done: tuple[Path, Path], copy: Path) -> None:
    for step in (copy / "checkpoints").glob("step-*"):
        step.rename(step.with_name(f"old-{step.name}"))
    history = (copy / "metrics.jsonl").read_bytes()
    refused = run(done[0], copy, way=ZERO1)
    assert max(refused.codes) == 65, refused.said
    assert "it is among the checkpoints of a run that has none, and has no checkpoint's name" in refused.said
    assert (copy / "metrics.jsonl").read_bytes() == history


def test_a_signal_where_nothing_is_kept_says_so(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=1_000_000, every=0, keep=1, schedule={"name": "constant", "warmup_steps": 4})

    def send(pids: list[int]) -> None:
        deadline = time.monotonic() + 60
        while steps_logged(tmp_path / "run") < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pids[0], signal.SIGTERM)

    command = arguments(recipe, tmp_path / "run", ONE)
    ended = run_ranks(train, command, world_size=1, log=tmp_path / "log", around=send)
    assert ended.codes == (130,), ended.said
    assert "nothing is saved (checkpoint.every = 0)" in ended.said


REFUSED = {
    "model": ("model.config.n_layer=3", "model.config.n_layer: ", "was saved with 4, this run has 3", "export"),
    "batch": ("batch.global_sequences=16", "batch.global_sequences: ", "6 steps × 8 = 48 sequences", "set it back"),
    "precision": ("precision.dtype=bf16", "precision.dtype: ", 'saved with "fp32"', "--allow-change precision"),
    "optimizer": ("optimizer.name=sgd", "optimizer.name: ", 'saved with "adamw"', "--allow-change optimizer"),
    "tokenizer": ("data.tokenizer=bpe:300", "data.tokenizer: ", "was saved with", "--allow-change tokenizer"),
    "seed": ("run.seed=7", "data.samples: ", "was saved with", "--allow-change data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_differ_is_refused_and_changes_nothing(name: str, done: tuple[Path, Path], copy: Path) -> None:
    setting, *words = REFUSED[name]
    # But for who holds the folder.
    files = [path for path in copy.rglob("*") if path.is_file() and "logs" not in path.parts and path.name != HOLDER]
    before = {path: path.read_bytes() for path in files}
    ended = run(done[0], copy, "--set", setting, "--set", "train.steps=8")
    errors = [line for line in ended.said.splitlines() if line.startswith("triaxis: error:")]
    assert ended.codes == (78,), ended.said
    about = [line for line in errors if words[0] in line]
    assert len(about) == 1, ended.said
    assert all(word in about[0] for word in words)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["precision", "optimizer", "seed"])
def test_a_named_change_is_allowed(name: str, done: tuple[Path, Path], copy: Path) -> None:
    setting, *_ = REFUSED[name]
    word = {"seed": "data"}.get(name, name)
    ended = run(done[0], copy, "--set", setting, "--set", "train.steps=8", "--allow-change", word)
    assert ended.codes == (0,), ended.said
    assert [step for step, *_ in numbers(copy)] == list(range(1, 9))


def test_a_damaged_newest_is_set_aside_and_the_one_before_goes_on(done: tuple[Path, Path], copy: Path) -> None:
    expected = numbers(copy), digests(copy / "checkpoints" / "step-00000006")
    (copy / "summary.json").unlink()
    flip(next((copy / "checkpoints" / "step-00000006").glob("rank-00001*")))
    ended = run(done[0], copy, way=ZERO1)
    assert ended.codes == (0, 0), ended.said
    assert "step-00000006 is not used" in ended.said
    assert "rank-00001.safetensors: damaged (its checksum does not match)" in ended.said
    assert "rank-00001" in (copy / "checkpoints" / "step-00000006.damaged" / "reason.txt").read_text()
    assert (numbers(copy), digests(copy / "checkpoints" / "step-00000006")) == expected


def test_when_none_is_whole_nothing_starts_from_scratch(done: tuple[Path, Path], copy: Path) -> None:
    for checkpoint in (copy / "checkpoints").iterdir():
        flip(next(checkpoint.glob("rank-00000*")))
    history = (copy / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the second time they are aside already
        ended = run(done[0], copy, "--set", "train.steps=8")
        assert ended.codes == (65,), ended.said
        assert "no checkpoint is whole" in ended.said
        assert "--resume never" in ended.said
    assert (copy / "metrics.jsonl").read_bytes() == history
    ended = run(done[0], copy, "--set", "train.steps=8", resume="never")
    assert ended.codes == (0,), ended.said
    assert (copy.with_name("run.before-1") / "metrics.jsonl").read_bytes() == history


def test_a_run_ended_before_its_first_checkpoint_begins_again(done: tuple[Path, Path], copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    ended = run(done[0], copy)
    assert ended.codes == (65,)
    assert "no checkpoint is there, though the run reached step 6 and saves every 2" in ended.said
    first = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (copy / "metrics.jsonl").write_bytes(first)
    ended = run(done[0], copy)
    assert ended.codes == (0,), ended.said
    assert "begins again at step 0" in ended.said
    assert [step for step, *_ in numbers(copy)] == list(range(1, 7))


def test_two_runs_do_not_share_a_folder(done: tuple[Path, Path], copy: Path) -> None:
    history = (copy / "metrics.jsonl").read_bytes()
    with leased(copy, JobStart()):
        ended = run(done[0], copy, "--set", "train.steps=8")
    assert ended.codes == (78,), ended.said
    assert "another process is training in it" in ended.said
    assert (copy / "metrics.jsonl").read_bytes() == history


def train_as(restarts: int, waits_at: int | None, run_dir: Path, command: list[str]) -> int:
    """`train` as a start of SLURM job 7. `waits_at`: at that step until another start wants the run folder."""
    os.environ.update(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    take = StepData.take

    def taking(data: StepData, step: int, **more: bool) -> Any:
        while step == waits_at and not (run_dir / WANTED).exists():
            time.sleep(0.01)
        return take(data, step, **more)

    StepData.take = taking  # type: ignore[method-assign]
    return train(command)


@pytest.mark.parametrize("way", [pytest.param(ONE, marks=pytest.mark.grid), ZERO1], ids=lambda way: way.name)
def test_ranks_that_slurm_has_lost_give_way_to_the_next_start_of_the_job(way: Way, tmp_path: Path) -> None:
    """They live on when their node's daemon ends, and hold the run folder."""
    recipe = write_recipe(tmp_path, steps=9, every=3, keep=9)
    run_dir, undisturbed, later = tmp_path / "run", tmp_path / "undisturbed", []

    def start_again(pids: list[int]) -> None:
        deadline = time.monotonic() + 60
        while steps_logged(run_dir) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        command = arguments(recipe, run_dir, way)
        later.append(run_ranks(train_as, 1, None, run_dir, command, world_size=way.processes, log=tmp_path / "later"))

    command = arguments(recipe, run_dir, way)
    lost = run_ranks(train_as, 0, 4, run_dir, command, world_size=way.processes, log=tmp_path / "log", around=start_again)
    (second,) = later
    assert lost.codes == (75,) * way.processes, lost.said
    assert "SLURM has started this job again: ended after step 5; the same command goes on after step 5" in lost.said
    assert second.codes == (0,) * way.processes, second.said
    assert second.said.count("the ranks of this job's earlier start live on") == 1
    assert "resumed after step 5" in second.said
    assert not (run_dir / WANTED).exists()
    assert run(recipe, undisturbed, way=way).codes == (0,) * way.processes
    assert numbers(run_dir) == numbers(undisturbed)
    assert digests(run_dir / "checkpoints" / "step-00000009") == digests(undisturbed / "checkpoints" / "step-00000009")


def take_over(run_dir: Path) -> None:
    """As a later start of job 7 on a file system whose locks do not reach it."""
    (run_dir / HOLDER).unlink()
    (run_dir / HOLDER).write_text(json.dumps({"job": "7", "restarts": 1, "host": "elsewhere", "pid": 1}))


def train_and_lose(step: int, run_dir: Path, command: list[str]) -> int:
    """`train` as a start of SLURM job 7, whose run folder is taken over in a step."""
    take = StepData.take

    def taking(data: StepData, now: int, **more: bool) -> Any:
        if now == step and data.group.rank == 0:
            take_over(run_dir)
        return take(data, now, **more)

    os.environ.update(SLURM_JOB_ID="7")
    StepData.take = taking  # type: ignore[method-assign]
    return train(command)


def test_a_start_whose_folder_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path, steps=9, every=7, keep=9), tmp_path / "run"
    ended = run_ranks(train_and_lose, 4, run_dir, arguments(recipe, run_dir, ZERO1), world_size=2, log=tmp_path / "log")
    assert ended.codes == (75, 75), ended.said
    assert ended.said.count("another start of this job has taken the run folder: this one ends, and writes nothing more") == 1
    assert not (run_dir / "summary.json").exists()
    assert not list((run_dir / "checkpoints").glob("*"))


def test_a_manifest_from_elsewhere_is_not_followed(done: tuple[Path, Path], copy: Path) -> None:
    newest, older = (copy / "checkpoints" / f"step-0000000{step}" for step in (6, 4))
    shutil.copy(older / MANIFEST, newest / MANIFEST)
    ended = run(done[0], copy, "--set", "train.steps=8")
    assert ended.codes == (0,), ended.said
    assert "its manifest is of step 4: put in from elsewhere" in ended.said


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_list_shows_and_verifies(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(copy)]) == 0
    assert "dp2, ZeRO-1" in capsys.readouterr().out
    flip(next((copy / "checkpoints" / "step-00000004").glob("rank-00001*")))
    assert main(["checkpoints", str(copy), "--verify"]) == 65
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step-")]
    assert [("intact" in row, "DAMAGED" in row) for row in rows] == [(True, False), (False, True), (True, False)]


def test_prune_keeps_the_newest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(copy), "--prune", "1"]) == 0
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-00000006"]
    flip(next((copy / "checkpoints" / "step-00000006").glob("rank-00001*")))
    assert main(["checkpoints", str(copy), "--prune", "1"]) == 65, "a damaged newest one makes no room"


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_export_loads_in_transformers_with_the_training_models_logits(
    dtype: str | None, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "hf"
    assert main(["export", str(copy), str(out), "--verify", *(["--dtype", dtype] if dtype else [])]) == 0
    assert "read back and equal" in capsys.readouterr().out
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert str(model.dtype) == f"torch.{'bfloat16' if dtype else 'float32'}"
    assert json.loads((out / "config.json").read_text())["dtype"] == ("bfloat16" if dtype else "float32")


def test_the_export_of_a_checkpoint_is_the_export_of_the_run(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["export", str(copy / "checkpoints" / "step-00000006"), str(tmp_path / "hf")]) == 0
    ours, theirs = load_file(tmp_path / "hf" / "model.safetensors"), load_file(copy / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert (tmp_path / "hf" / "config.json").read_text() == (copy / "export" / "config.json").read_text()


def test_a_damaged_checkpoint_is_not_exported(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(next((copy / "checkpoints" / "step-00000006").glob("rank-00000*")))
    assert main(["export", str(copy), str(tmp_path / "hf")]) == 65
    assert "its checksum does not match" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_text_from_a_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(copy / "checkpoints" / "step-00000006")
    assert main(["generate", checkpoint, "--prompt", "7 times ", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("7 times ")


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.chmod(0o600)
    path.write_bytes(data)
