"""Secrets are planted in the environment, a recipe, --set and errors; every byte written or said is searched for them."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.end_to_end.runs import write_recipe
from tests.unit.wandb_files import records

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "WANDB_API_KEY": "5ec7e70000000000000000000000000000000001",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted02",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/key/03=",
    "MY_SERVICE_PASSWORD": "planted service password 04",
}
URL_PASSWORD, SIGNATURE, GITHUB_TOKEN = "planted@url-05", "planted-signature-06", "ghp_PlantedPlantedPlantedPlantedPlanted07"
PROMPT_PASSWORD, KEYED = "planted-prompt-08", "planted-keyed-09"
IN_RECIPE = (URL_PASSWORD, SIGNATURE, GITHUB_TOKEN, KEYED)
ON_COMMAND_LINE = (PROMPT_PASSWORD,)
SECRETS = (*ENVIRONMENT.values(), *IN_RECIPE, *ON_COMMAND_LINE)
URL = f"https://me:{URL_PASSWORD}@data.example.test/corpus.jsonl?X-Amz-Signature={SIGNATURE}"


def forms(secret: str) -> tuple[bytes, ...]:
    """The ways in which a secret may be written: as it is, in JSON, in a URL, in base64."""
    return (
        secret.encode(),
        json.dumps(secret).strip('"').encode(),
        quote(secret, safe="").encode(),
        base64.b64encode(secret.encode()).rstrip(b"=")[:-1],
    )


def found_in(content: bytes, secrets: Sequence[str] = SECRETS) -> list[str]:
    return [secret for secret in secrets if any(form in content for form in forms(secret))]


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what they are once they are unpacked."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    if path.suffix == ".wandb":  # its blocks may cut a record in two
        yield from (record.SerializeToString() for record in records(path))


def leaks(folder: Path) -> dict[str, list[str]]:
    """File → the secrets in it, or in its name. Left out: `inputs`, which the user wrote."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and folder / "inputs" not in path.parents]
    assert files
    where = {str(path.relative_to(folder)): path for path in files}
    hits = {name: [hit for text in (name.encode(), *contents(path)) for hit in found_in(text)] for name, path in where.items()}
    return {name: hit for name, hit in hits.items() if hit}


@dataclass
class CommandLines:
    """Those of all processes of this machine, looked at again and again while the block runs."""

    hits: dict[int, list[str]] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)

    def __enter__(self) -> CommandLines:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    line = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if hit := found_in(line, (*ENVIRONMENT.values(), *IN_RECIPE)):
                    self.hits[int(process.name)] = hit
                if b"trainer" in line:
                    self.ours.add(line.replace(b"\0", b" ").decode(errors="replace"))


@dataclass(frozen=True)
class Ran:
    code: int
    said: str


def run(*words: str, cwd: Path, **more: str) -> Ran:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(cwd / "home"),
    }
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment | ENVIRONMENT | more,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Ran(done.returncode, done.stdout + done.stderr)


def triaxis(*words: str, cwd: Path, **more: str) -> Ran:
    return run("-m", "trainer", *words, cwd=cwd, **more)


def settings(values: Mapping[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Done:
    """A run with all mirrors and its commands afterwards, in one folder."""

    folder: Path
    recipe: Path
    said: dict[str, Ran]
    lines: CommandLines

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "small"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "home").mkdir()
    recipe = planted_recipe(folder)
    prompt = settings({"train.sample_prompt": f"https://me:{PROMPT_PASSWORD}@host "})
    said = {}
    with CommandLines() as lines:
        for name, words in {
            "submit": ["submit", str(recipe), "--nodes", "1", "--ranks-per-node", "2", "--dry-run"],
            "train": ["train", str(recipe), *prompt],
            "goes on": ["train", str(recipe), *prompt, "--set", "train.steps=8"],
            "check": ["check", str(recipe), *prompt],
            "check --json": ["check", str(recipe), *prompt, "--json", "--world-size", "1"],
            "checkpoints": ["checkpoints", str(folder / "runs" / "small"), "--verify"],
            "export": ["export", str(folder / "runs" / "small"), str(folder / "exported")],
            "report": ["report", str(folder / "runs" / "small")],
        }.items():
            said[name] = triaxis(*words, cwd=folder)
    return Done(folder, recipe, said, lines)


def planted_recipe(folder: Path) -> Path:
    (folder / "inputs").mkdir()
    path = write_recipe(folder / "inputs")
    recipe = json.loads(path.read_text())
    recipe["description"] = f"mirror of {URL}; MY_API_KEY={KEYED}"
    recipe["run"]["dir"] = str(folder / "runs")
    recipe["train"] |= {"steps": 6, "eval_every": 3}
    recipe["checkpoint"] = {"every": 3}
    recipe["tracking"] = {"wandb": {"mode": "offline", "tags": [GITHUB_TOKEN, "plain"]}, "tensorboard": True}
    path.write_text(json.dumps(recipe))
    return path


def test_the_search_finds_what_is_there(done: Done) -> None:
    assert set(found_in(done.recipe.read_bytes())) == set(IN_RECIPE)
    packed = done.folder / "inputs" / "packed.gz"
    packed.write_bytes(gzip.compress(ENVIRONMENT["HF_TOKEN"].encode()))
    assert [hit for content in contents(packed) for hit in found_in(content)] == [ENVIRONMENT["HF_TOKEN"]]


def test_every_command_works_on_secrets_that_it_does_not_tell(done: Done) -> None:
    assert {name: ran.code for name, ran in done.said.items()} == dict.fromkeys(done.said, 0), done.said
    assert {name: found_in(ran.said.encode()) for name, ran in done.said.items()} == {name: [] for name in done.said}


def test_no_file_holds_one(done: Done) -> None:
    for part in ("tensorboard/*", "wandb/*/*.wandb", "checkpoints/*/manifest.json", "report.html", "job.sbatch", "logs/*.log"):
        assert list(done.run_dir.glob(part)), part
    assert leaks(done.folder) == {}


def test_the_copies_say_that_something_was_taken_out(done: Done) -> None:
    masked = "mirror of https://[redacted]@data.example.test/corpus.jsonl?X-Amz-Signature=[redacted]; MY_API_KEY=[redacted]"
    (manifest,) = list((done.run_dir / "checkpoints").glob("step-00000008/manifest.json"))
    for path in (done.run_dir / "recipe.json", manifest):
        text = path.read_text()
        copy = json.loads(text)
        assert copy.get("recipe", copy)["description"] == masked, path
        assert copy.get("recipe", copy)["tracking"]["wandb"]["tags"] == ["[redacted]", "plain"], path
    resolved = json.loads((done.run_dir / "resolved.json").read_text())["values"]
    assert resolved["description"]["value"] == masked
    assert masked in done.said["check --json"].said
    assert masked in (done.run_dir / "report.html").read_text()


def test_no_command_line_holds_one(done: Done) -> None:
    assert any("trainer.track.wandb" in line for line in done.lines.ours), "the W&B child was not seen"
    assert done.lines.hits == {}


# ---------------------------------------------------------------------------------------------- what would put one down


@pytest.mark.parametrize(
    "setting",
    [
        f"description=https://me:{URL_PASSWORD}@host/",
        f'tracking.wandb.tags=["{GITHUB_TOKEN}"]',
        f"train.sample_prompt={ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}",
    ],
)
def test_a_secret_setting_is_not_submitted(setting: str, tmp_path: Path) -> None:
    shape = ["--nodes", "1", "--ranks-per-node", "2", "--run-dir", str(tmp_path / "run")]
    ran = triaxis("submit", str(planted_recipe(tmp_path)), *shape, "--set", setting, cwd=tmp_path)
    key = setting.partition("=")[0]
    assert (ran.code, found_in(ran.said.encode())) == (78, [])
    assert f"--set {key} holds a secret" in ran.said
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- in errors


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (f"data.sources[0].path={URL}", 'data.sources[0].path = "https://[redacted]@data.example.test/'),
        (f'optimizer.lr="https://me:{KEYED}{"x" * 60}@host"', "optimizer.lr = "),  # longer than what is shown of it
        (f"data.tokenizer={GITHUB_TOKEN}", "[redacted]"),
    ],
)
def test_an_error_names_the_value_without_it(setting: str, named: str, tmp_path: Path) -> None:
    recipe = planted_recipe(tmp_path)
    ran = triaxis("train", str(recipe), "--set", setting, cwd=tmp_path)
    assert ran.code == 78, ran.said
    assert named in ran.said
    assert found_in(ran.said.encode()) == []
    if (tmp_path / "runs").exists():
        assert leaks(tmp_path) == {}


BUG = """
import os, sys
import trainer.loop
from trainer.cli import main
def evaluate(run, *, steps_done):
    import logging
    text = f"{sys.argv[2]} refused {os.environ['MY_SERVICE_PASSWORD']}"
    try:
        raise KeyError(text)
    except KeyError:
        logging.getLogger("a.dependency").exception(text)
    late = logging.getLogger("a.late.dependency")  # with a handler that nobody could take away yet
    late.propagate = False
    late.addHandler(logging.StreamHandler())
    late.warning("late: %s", text)
    run.tracker.note(text)
    raise ValueError(text)
trainer.loop.evaluate = evaluate
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_bug_s_traceback_and_all_logs_are_without_it(tmp_path: Path) -> None:
    ran = run("-c", BUG, str(planted_recipe(tmp_path)), URL, cwd=tmp_path)
    assert ran.code == 70, ran.said
    assert "Traceback" in ran.said
    assert "ValueError: https://[redacted]@data.example.test" in ran.said
    assert "late: https://[redacted]@data.example.test" in ran.said
    assert found_in(ran.said.encode()) == []
    assert (tmp_path / "runs" / "small" / "logs" / "rank-00000.log").read_text().count("https://[redacted]@") >= 2
    assert "https://[redacted]@" in (tmp_path / "runs" / "small" / "summary.json").read_text()
    assert leaks(tmp_path) == {}
