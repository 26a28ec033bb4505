"""The W&B mirror against the real W&B: an offline run read back from its file, and servers that fail in every way."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.wandb_files import history, records
from trainer.schema import Wandb
from trainer.track import wandb as mirror
from trainer.track.run_info import RunInfo
from trainer.track.wandb import WandbTracker

pytestmark = pytest.mark.timeout(60)

SECRET = "sEcReT-0123456789"


@pytest.fixture(autouse=True)
def own_wandb_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, setting or proxy of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def info(folder: Path, recipe: Mapping[str, Any] | None = None) -> RunInfo:
    return RunInfo(name="a-run", folder=folder, recipe=recipe or {}, total_steps=3, world_size=2, devices="2 CPU")


class LateTracker(WandbTracker):
    """Its child is opened only once the run has logged: a log() that waited for W&B would never return."""

    def __init__(self, settings: Wandb, note: Callable[[str], None]) -> None:
        super().__init__(settings, note)
        self.logged = threading.Event()

    def _open(self) -> Any:
        self.logged.wait()
        return super()._open()


def run_through(settings: Wandb, folder: Path, recipe: Mapping[str, Any] | None = None) -> list[str]:
    """The notes of a run of three steps; nothing of W&B outlives its end."""
    notes: list[str] = []
    tracker = LateTracker(settings, notes.append)
    tracker.start(info(folder, recipe))
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": float("nan") if step == 2 else 1 / (3 * step), "mfu": None})
    tracker.evaluate({"step": 3, "eval_loss": 0.7})
    tracker.logged.set()
    tracker.finish({"final_loss": 1 / 9, "sample": "text"})
    assert not tracker._thread.is_alive()
    assert tracker._child is not None
    assert tracker._child._process.poll() is not None
    return notes


# ------------------------------------------------------------------------------------------------- reading W&B's file


def offline_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_an_offline_run_holds_the_whole_history_once_and_no_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["train", f"--token={SECRET}"])
    recipe = {"data": {"path": f"https://me:{SECRET}@host/x", "api_key": SECRET}, "train": {"steps": 3}}
    notes = run_through(Wandb(mode="offline", project="p", tags=["t"], entity="team"), folder, recipe)

    (path,) = offline_files(folder)
    rows = history(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    losses = [row.get("train/loss") for row in rows]
    assert math.isnan(losses[1])
    assert [losses[0], *losses[2:]] == [1 / 3, 1 / 9, None]
    assert rows[3]["eval/loss"] == 0.7

    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    kept_id = json.loads((folder / "wandb-id.json").read_text())["id"]
    assert (run.run_id, run.project, run.entity, run.display_name) == (kept_id, "p", "team", "a-run")
    assert list(run.tags) == ["t"]
    assert run.host == ""
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == {
        "data": {"path": "https://[redacted]@host/x", "api_key": "[redacted]"},
        "train": {"steps": 3},
        "world_size": 2,
        "devices": "2 CPU",
    }
    assert notes == [f"W&B: run kept offline; upload it with: wandb sync {path.parent}"]
    for written in folder.rglob("*"):
        if written.is_file():
            assert SECRET.encode() not in written.read_bytes(), written


def test_nothing_stays_in_the_temporary_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_through(Wandb(mode="offline"), folder)
    assert offline_files(folder)
    assert list(temporary.iterdir()) == []


def test_the_id_belongs_to_the_run_folder(folder: Path) -> None:
    first = mirror._kept_id(folder)
    assert mirror._kept_id(folder) == first
    assert first.isalnum()


# ------------------------------------------------------------------------------------------------- W&B in trouble


@contextmanager
def hanging_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def failing_server() -> Iterator[str]:
    """Answers everything with 500."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_error(500)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def refused_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("trouble", [hanging_server, failing_server, refused_port])
def test_an_unreachable_server_costs_nothing_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    monkeypatch.setattr(mirror, "START_LIMIT_AT_FINISH_S", 1.5)
    monkeypatch.setattr(mirror, "FINISH_LIMIT_S", 60.0)  # W&B is imported twice, on a machine that may be busy
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with trouble() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        notes = run_through(Wandb(mode="online"), folder)
    (path,) = offline_files(folder)
    assert [row["step"] for row in history(path)] == [1, 2, 3, 3]
    (note,) = notes
    assert note.startswith("warning: W&B cannot be reached (")
    assert note.endswith(f"upload it with: wandb sync {path.parent}")


def test_without_a_key_nobody_is_asked_for_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "START_LIMIT_AT_FINISH_S", 30.0)
    monkeypatch.setattr(mirror, "FINISH_LIMIT_S", 60.0)
    notes = run_through(Wandb(mode="online"), folder)
    assert len(notes) == 1
    assert "api_key" in notes[0] or "API key" in notes[0]
    assert len(offline_files(folder)) == 1


def package(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `wandb` that is found before the real one."""
    (folder / "wandb.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_module_that_raises_is_one_warning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "raise RuntimeError('no such luck')", monkeypatch)
    notes = run_through(Wandb(mode="offline"), folder)
    assert notes == ["warning: W&B stopped (RuntimeError: no such luck); the run goes on, metrics.jsonl has the whole history"]


def test_a_module_that_blocks_is_left_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(mirror, "FINISH_LIMIT_S", 1.0)
    notes = run_through(Wandb(mode="offline"), folder)
    assert notes == ["warning: W&B stopped (no end within 1 s); the run goes on, metrics.jsonl has the whole history"]


def test_a_slow_child_drops_records_with_one_warning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(mirror, "QUEUE_RECORDS", 5)
    monkeypatch.setattr(mirror, "FINISH_LIMIT_S", 0.5)
    notes: list[str] = []
    tracker = LateTracker(Wandb(mode="offline"), notes.append)
    tracker.start(info(folder))
    for step in range(1, 101):
        tracker.log({"step": step, "loss": 1.0})
    tracker.logged.set()
    tracker.finish({})
    assert [note.split(";")[0] for note in notes] == [
        "warning: W&B is slower than the run and misses records",
        "warning: W&B stopped (no end within 0 s)",
    ]


def test_a_killed_run_leaves_its_history_and_no_process(folder: Path) -> None:
    code = (
        "import os, signal, time; from pathlib import Path\n"
        "from trainer.track.wandb import WandbTracker; from trainer.track.run_info import RunInfo\n"
        "from trainer.schema import Wandb\n"
        "t = WandbTracker(Wandb(mode='offline', id='killed'), print)\n"
        f"folder = Path({str(folder)!r})\n"
        "t.start(RunInfo(name='r', folder=folder, recipe={}, total_steps=3, world_size=1, devices=''))\n"
        "t.log({'step': 1, 'loss': 0.5})\n"
        "while not (t._child and t._child.how_to_sync().endswith('killed')) or t._lines.qsize(): time.sleep(0.02)\n"
        "time.sleep(0.2)\n"
        "child = t._child._process.pid; print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == -9
    child = int(ended.stdout.splitlines()[-1])
    deadline = time.monotonic() + 15
    while Path(f"/proc/{child}").exists() and not _is_zombie(child):
        assert time.monotonic() < deadline, "the W&B process outlives the run"
        time.sleep(0.05)
    (path,) = offline_files(folder)
    assert [(row["step"], row["train/loss"]) for row in history(path)] == [(1, 0.5)]
    (end,) = [record.exit for record in records(path) if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
