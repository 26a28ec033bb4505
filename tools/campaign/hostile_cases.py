"""What `hostile` tries, by kind: each draws a command, what it finds, and under which limits it runs."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.campaign.cases import WAYS, arguments, write_recipe
from tools.campaign.damage import flipped, lengthened, sealed, truncated, zeroed
from tools.campaign.ranks import run_ranks, train
from trainer.checkpoint.manifest import MANIFEST
from trainer.sections import Recipe

Random = random.Random
ODD_NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, -1, 0.5, 1e-300, 1e300, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30, 1.0, -0.0)
ODD_TEXTS = (
    *("", " ", "x", "-", "--help", "../..", "~", "~nobody/x", "s3://bucket/x", "file:///tmp", "a\0b", "\x1b[31m", "é" * 200),
    *(
        "a" * 300,
        "/dev/null/x",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "{{7*7}}",
        "$(id)",
        "%s%s%n",
        "null",
        "1٣",
        "\u202e",
    ),
)
ODD_VALUES: tuple[Any, ...] = (None, True, [], {}, [[]], [None], {"": 1}, *ODD_NUMBERS, *ODD_TEXTS)


@dataclass
class Case:
    """`command`: of triaxis, which runs in `folder` on `ranks` processes. `environment`: variables to set, or to remove (None).
    `limits`: names of RLIMIT_*. `outputs`: where stdout and stderr go instead of a file. `signals`: (after so many seconds,
    which). `what`: in words."""

    what: str
    command: list[str]
    folder: Path
    ranks: int = 1
    environment: dict[str, str | None] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    signals: tuple[tuple[float, int], ...] = ()
    in_a_folder_that_is_gone: bool = False
    is_alone: bool = False  # in a process of its own, as limits and outputs would be ours too
    disk: tuple[Path, int] | None = None  # a folder that is a disk of so many KiB

    @property
    def starts(self) -> bool:
        """Whether a run is really started."""
        return self.command[0] in ("train", "eval", "export", "generate") or self.command[:2] == ["data", "prepare"]


@dataclass(frozen=True)
class Originals:
    """What is copied and then spoilt: `recipe`, of a run of three steps in `run`, and files of data by name."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Originals:
        """RuntimeError when the undisturbed run fails."""
        recipe = write_recipe(
            folder,
            steps=3,
            every=1,
            keep=2,
            hidden=16,
            train={"eval_every": 2},
            schedule={"warmup_steps": 0},
            data=_evaluated(folder),
        )
        ended = run_ranks(train, arguments(recipe, folder / "run", WAYS[0]), world_size=1, log=folder / "log")
        if any(ended.codes):
            raise RuntimeError(ended.said)
        return cls(folder)

    @property
    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "recipe.json").read_text())
        return found


def _evaluated(folder: Path) -> dict[str, Any]:
    return {"eval_fraction": 0.1, "sources": [{"path": str(folder / "text.txt")}]}


Draw = Callable[[Random, Originals, Path], Case]


# ---------------------------------------------------------------------------------------------------------- recipes


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = _put(changed[path[0]], path[1:], new)
    return changed


def spoilt(stream: Random, value: Any) -> Any:
    """A JSON value with one to three parts of it replaced."""
    for _ in range(stream.choice([1, 1, 1, 2, 3])):
        place = stream.choice([path for path in _places(value) if path] or [()])
        value = _put(value, place, stream.choice(ODD_VALUES))
    return value


def _spoilt_text(stream: Random, text: bytes) -> bytes:
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: flipped(stream, text),
        lambda: truncated(stream, text),
        lambda: lengthened(stream, text),
        lambda: zeroed(stream, text),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode(errors="replace").encode("utf-16"),
        lambda: b"[" * stream.choice([40, 3000, 100_000]),
        lambda: b'{"a":' * 3000,
        lambda: stream.randbytes(stream.choice([0, 1, 100])),
        lambda: text.replace(b"1", "1\u0663".encode()),
        lambda: text.replace(b":", b"::", 1),
        lambda: b"1" * 5000,
    )
    return stream.choice(ways)()


def recipe(stream: Random, originals: Originals, folder: Path) -> Case:
    """A recipe whose values, or whose bytes, are spoilt; checked, or also started."""
    path = folder / "recipe.json"
    if stream.random() < 0.7:
        given = _whole_recipe(originals) if stream.random() < 0.5 else originals.recipe
        path.write_text(json.dumps(spoilt(stream, given)))
    else:
        path.write_bytes(_spoilt_text(stream, json.dumps(originals.recipe).encode()))
    words = stream.choice([["check"], ["check", "--world-size", "4"], ["check", "--json"], ["schedule"], SUBMIT])
    return Case("a spoilt recipe", [words[0], str(path), *words[1:]], folder)


SUBMIT = ["submit", "--nodes", "1", "--ranks-per-node", "2", "--dry-run"]


def _whole_recipe(originals: Originals) -> dict[str, Any]:
    """Every key with its default, beside what the recipe says."""
    found: dict[str, Any] = Recipe.model_validate(originals.recipe).model_dump()
    return found


def chain(stream: Random, originals: Originals, folder: Path) -> Case:
    """Recipes that extend others: long chains, circles, pipes, devices, what is not there."""
    last = stream.choice(["0.json", "nothing.json", "/dev/zero", "pipe", ".", "gone/../../x.json", "\0", "a" * 300])
    os.mkfifo(folder / "pipe")
    length = stream.choice([1, 2, 33, 400])
    for n in range(length):
        following = f"{n + 1}.json" if n + 1 < length else last
        (folder / f"{n}.json").write_text(json.dumps({"extends": following, "train": {"steps": n + 1}}))
    return Case(
        f"a chain of {length} recipes, the last of which extends {last[:20]!r}", ["check", str(folder / "0.json")], folder
    )


def setting(stream: Random, originals: Originals, folder: Path) -> Case:
    """An odd --set."""
    keys = [".".join(map(str, path)) for path in _places(_whole_recipe(originals)) if path]
    key = stream.choice(
        [*keys, "data.sources[0].path", "data.sources[99].path", "", "a..b", "model.config.x", "[0]", "é", "a\udcff"]
    )
    value = stream.choice([*map(json.dumps, ODD_VALUES), *ODD_TEXTS, "\udcff\udcfe", "[" * 3000, '{"a":' * 3000])
    if "\0" in value or "\0" in key:  # the system takes no such argument
        value = value.replace("\0", "")
    return Case(f"--set {key[:40]}", ["check", str(originals.folder / "recipe.json"), "--set", f"{key}={value}"], folder)


def _numbers() -> list[str]:
    keys = []
    for path in _places(Recipe().model_dump()):
        value: Any = Recipe().model_dump()
        for part in path:
            value = value[part]
        if isinstance(value, int | float) and not isinstance(value, bool):
            keys.append(".".join(map(str, path)))
    return keys


NUMBERS = _numbers()


def number(stream: Random, originals: Originals, folder: Path) -> Case:
    """A number at the edge of what the schema allows, or beyond; the run is started."""
    key, value = stream.choice(NUMBERS), stream.choice(ODD_NUMBERS)
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    if stream.random() < 0.4:
        command += ["--set", f"zero.stage={stream.choice([1, 2, 3])}"]
    return Case(f"{key} = {value}", [*command, "--set", f"{key}={json.dumps(value)}"], folder, ranks=stream.choice([1, 1, 2]))


# ------------------------------------------------------------------------------------------------------------ paths


def _odd_places(stream: Random, folder: Path) -> str:
    (folder / "file").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "read-only").mkdir(mode=0o500)
    named = [
        str(folder / name) for name in ("file", "file/x", "pipe", "loop", "dangling", "dangling/x", "read-only/x", "é ü/x")
    ]
    others = ["/dev/full", "/dev/null", "/dev/zero", "/proc/x", "/sys/x", "/proc/self/fd/1", "a" * 255, "x/" * 2000]
    return stream.choice([*named, *others, *ODD_TEXTS])


def path(stream: Random, originals: Originals, folder: Path) -> Case:
    """A path of the recipe or of the command line that leads to something odd."""
    odd = _odd_places(stream, folder).replace("\0", "" if stream.random() < 0.5 else "\\u0000")
    recipe_file, run = str(originals.folder / "recipe.json"), ["--run-dir", str(folder / "run")]
    keys = ("run.dir", "data.cache_dir", "data.sources[0].path", "data.tokenizer", "model.from_pretrained", "parallel.schedule")
    offload = [
        "--set",
        "zero.stage=3",
        "--set",
        "zero.offload_param.device=nvme",
        "--set",
        f"zero.offload_param.nvme_path={odd}",
    ]
    commands = [
        *(["train", recipe_file, *(run if key != "run.dir" else []), "--set", f"{key}={json.dumps(odd)}"] for key in keys),
        ["train", recipe_file, *run, "--set", "parallel.pipeline=2", "--set", f"parallel.schedule={json.dumps(odd)}"],
        ["train", recipe_file, *run, *offload],
        ["train", recipe_file, "--run-dir", odd],
        ["train", recipe_file, *run, "--resume", odd],
        ["train", odd, *run],
        ["check", odd],
        *([word, odd] for word in ("report", "checkpoints")),
        ["data", "inspect", odd],
        ["export", odd, str(folder / "out")],
        ["export", str(originals.folder / "run"), odd],
        ["eval", odd],
        ["eval", str(originals.folder / "run"), odd],
        ["generate", odd, "--prompt", "a"],
        [SUBMIT[0], recipe_file, *SUBMIT[1:], "--site", odd],
        [SUBMIT[0], recipe_file, *SUBMIT[1:], "--template", "array", "--sweep", odd],
    ]
    command = stream.choice(commands)
    return Case(f"{command[0]} with the path {odd[:40]!r}", command, folder, ranks=2 if "parallel.pipeline=2" in command else 1)


# ------------------------------------------------------------------------------------------------------------- data

ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": f"row {n} of some" * 3} for n in range(20)],
    "sft": [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(20)],
    "classify": [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(20)],
    "preference": [{"prompt": f"{n}?", "chosen": "yes " * 3, "rejected": "no"} for n in range(20)],
}


def _table(rows: list[dict[str, Any]], delimiter: str) -> str:
    lines = [list(rows[0]), *([json.dumps(value) for value in row.values()] for row in rows)]
    return "\n".join(delimiter.join(map(str, line)) for line in lines)


def data(stream: Random, originals: Originals, folder: Path) -> Case:
    """A file of data that is damaged, of another kind than its name says, or no file; it is tokenized."""
    task = stream.choice(list(ROWS))
    rows = ROWS[task] if stream.random() < 0.5 else [spoilt(stream, row) for row in ROWS[task]]
    forms = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows),
        ".csv": _table(ROWS[task], ","),
        ".tsv": _table(ROWS[task], "\t"),
        ".txt": str(rows),
        ".parquet": "PAR1",
        ".arrow": "ARROW1",
    }
    ending = stream.choice(list(forms))
    content = forms[stream.choice([ending, ending, ending, stream.choice(list(forms))])].encode()
    if stream.random() < 0.5:
        content = stream.choice([_spoilt_text(stream, content), content.split(b"\n")[0] + b"\n", b"\n" * 50, b""])
    packing = stream.choice(["", "", ".gz", ".zst"])
    target = folder / f"data{ending}{packing}"
    if stream.random() < 0.1:
        stream.choice([os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])(target)
    else:
        packed = gzip.compress(content) if packing == ".gz" else content
        target.write_bytes(truncated(stream, packed) if packing and stream.random() < 0.3 and packed else packed)
    given = originals.recipe
    given["data"] |= {
        "task": task,
        "sources": [{"path": str(stream.choice([target, folder]))}],
        "cache_dir": str(folder / "cache"),
    }
    (folder / "recipe.json").write_text(json.dumps(given))
    command = ["train", str(folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    if stream.random() < 0.5:
        command = ["data", "prepare", str(folder / "recipe.json"), "--set", "data.workers=1"]
    return Case(f"{task} from {target.name}", command, folder)


TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'x'|center(999999999) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ 'a' * 9999 * 9999 }}",
    "{{ range(99999)|map('string')|join('x' * 9999) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages[0]['content'] + 1 }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{% for m in messages %}{{ m.content|urlize }}{{ m|tojson(indent=999999999) }}{% endfor %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{",
    "{{ lipsum(n=9999) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "((((" * 5000,
    "x" * 2_000_000,
    5,
    [{"name": "default", "template": "{{ messages }}"}],
)
BOMBS = (
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "FixedLength", "length": 0},
)


def tokenizer(stream: Random, originals: Originals, folder: Path) -> Case:
    """A tokenizer's folder with a hostile template, a regular expression that explodes, or spoilt files."""
    named = folder / "tokenizer"
    shutil.copytree(originals.folder / "run" / "export", named)
    config_file, backend_file = named / "tokenizer_config.json", named / "tokenizer.json"
    drawn = stream.choice(["template", "template", "regex", "config", "backend", "bytes"])
    config, backend = json.loads(config_file.read_text()), json.loads(backend_file.read_text())
    if drawn == "template":
        config["chat_template"] = stream.choice(TEMPLATES)
    elif drawn == "regex":
        backend["pre_tokenizer"] = stream.choice(BOMBS)
    elif drawn == "config":
        config = spoilt(stream, config)
    elif drawn == "backend":
        backend = spoilt(stream, backend)
    config_file.write_text(json.dumps(config))
    backend_file.write_text(json.dumps(backend))
    if drawn == "bytes":
        _other_bytes(stream, stream.choice([config_file, backend_file, named / "config.json"]))
    given = originals.recipe
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS["sft"] + [{"messages": _long_turn(stream)}])))
    given["data"] |= {"task": "sft", "sources": [{"path": str(folder / "rows.jsonl")}], "cache_dir": str(folder / "cache")}
    given["data"] |= {"tokenizer": str(named), "workers": 1}
    (folder / "recipe.json").write_text(json.dumps(given))
    command = ["train", str(folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    if stream.random() < 0.5:
        command = ["data", "prepare", str(folder / "recipe.json")]
    return Case(f"{command[0]} with a tokenizer whose {drawn} is hostile", command, folder)


def _long_turn(stream: Random) -> list[dict[str, str]]:
    text = stream.choice(["a" * 60 + "!", "a" * 3000, "é" * 50])
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


# ----------------------------------------------------------------------------------------------------- run folders


def _other_bytes(stream: Random, path: Path) -> None:
    content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if isinstance(value, dict | list) and stream.random() < 0.7:
        value = spoilt(stream, value)
        is_sealed = path.name == MANIFEST and isinstance(value, dict)
        path.write_bytes(sealed(value) if is_sealed else json.dumps(value).encode())
    elif path.suffix == ".jsonl" and stream.random() < 0.7:
        lines = [json.dumps(spoilt(stream, json.loads(line))) for line in content.splitlines()]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(_spoilt_text(stream, content) if content else b"x")


def _another_thing(stream: Random, path: Path) -> None:
    path.unlink()
    ways: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),  # a hole: it claims a terabyte
    )
    stream.choice(ways)()


def run_folder(stream: Random, originals: Originals, folder: Path) -> Case:
    """A run of which one file, or what tokenized data it has, was edited, sealed again, or replaced; what reads it next."""
    run = folder / "run"
    shutil.copytree(originals.folder / "run", run, symlinks=True)
    shutil.copytree(originals.folder / "data", folder / "data")
    files = [path for path in sorted((*run.rglob("*"), *(folder / "data").rglob("*"))) if path.is_file()]
    victim = stream.choice(
        [stream.choice(files), stream.choice([path for path in files if path.suffix in (".json", ".jsonl")])]
    )
    stream.choice([_other_bytes, _other_bytes, _another_thing])(stream, victim)
    given = {**originals.recipe, "train": {"steps": 4, "eval_every": 2}}
    given["data"] = {**given["data"], "cache_dir": str(folder / "data")}
    (folder / "recipe.json").write_text(json.dumps(given))
    commands = [
        ["train", str(folder / "recipe.json"), "--run-dir", str(run)],
        ["train", str(folder / "recipe.json"), "--run-dir", str(run)],
        ["report", str(run)],
        ["checkpoints", str(run), "--verify"],
        ["data", "inspect", str(folder / "data")],
        ["export", str(run), str(folder / "out")],
        ["eval", str(run)],
        ["generate", str(run / "export"), "--prompt", "a", "--max-new-tokens", "2"],
    ]
    command = stream.choice(commands)
    return Case(f"{command[0]} after {victim.relative_to(folder)} was spoilt", command, folder)


# ------------------------------------------------------------------------------------- environment, limits, signals


def environment(stream: Random, originals: Originals, folder: Path) -> Case:
    """Variables of launchers and libraries that contradict each other or are none."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    slurm = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_RESTART_COUNT")
    others = (
        "DS_ACCELERATOR",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "OMP_NUM_THREADS",
        "HOME",
        "COLUMNS",
    )
    others += (
        "TMPDIR",
        "PYTHONIOENCODING",
        "LC_ALL",
        "TZ",
        "SLURM_JOB_ID",
        "TORCH_LOGS",
        "CUDA_VISIBLE_DEVICES",
        "LANG",
        "TERM",
    )
    odd = ("", "0", "1", "-1", "abc", "99999999999999999999", "1.5", "cuda", "/nowhere", "host name", "1٣", " 0 ", "é", "ascii")
    wanted: dict[str, str | None] = {}
    for name in stream.sample([*launcher, *slurm, *others], stream.choice([1, 2, 3])):
        wanted[name] = stream.choice([None, *odd])
    if wanted.get("WORLD_SIZE") not in (None, "1") or "MASTER_ADDR" in wanted:
        wanted["RANK"] = stream.choice(["", "abc", "5", "-1"])  # else it waits for ranks that never come, as it must
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    command += ["--set", "guard.timeout_s=20", "--set", "guard.long_timeout_s=20"]
    return Case(f"environment {wanted}", command, folder, environment=wanted)


def limits(stream: Random, originals: Originals, folder: Path) -> Case:
    """Few open files, small files, outputs that are full, closed or of another alphabet."""
    drawn = stream.choice(["files", "size", "full", "full", "closed", "ascii", "gone"])
    train_it = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run")]
    readers = [
        ["check", str(originals.folder / "recipe.json")],
        ["schema"],
        ["report", str(folder / "copy")],
        ["check", "nothing"],
    ]
    case = Case(drawn, stream.choice([train_it, train_it, *readers]), folder, is_alone=True)
    shutil.copytree(originals.folder / "run", folder / "copy")
    if drawn == "files":
        case.limits["NOFILE"] = stream.choice([10, 12, 16, 20, 24, 32, 48])
    elif drawn == "size":
        case.limits["FSIZE"] = stream.choice([0, 100, 4096, 20_000, 100_000])
    elif drawn == "full":
        case.outputs = {stream.choice([1, 2]): "/dev/full"} if stream.random() < 0.7 else {1: "/dev/full", 2: "/dev/full"}
    elif drawn == "closed":
        case.outputs = {stream.choice([1, 2]): ""}
    elif drawn == "ascii":
        case.environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    else:
        case.in_a_folder_that_is_gone = True
    case.what = f"{case.command[0]} with {drawn} {case.limits or case.outputs or ''}"
    return case


def disk(stream: Random, originals: Originals, folder: Path) -> Case:
    """A run whose folder, data or export lies on a disk that is too small for it."""
    small = folder / "disk"
    small.mkdir()
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(small / "run"), "--set", "train.steps=4"]
    if stream.random() < 0.4:
        command += ["--set", f"data.cache_dir={small / 'data'}"]
    if stream.random() < 0.2:
        command = ["export", str(originals.folder / "run"), str(small / "out")]
    kib = stream.choice([4, 16, 40, 64, 100, 160, 250, 400, 600, 800, 1000, 1500])
    return Case(f"{command[0]} on a disk of {kib} KiB", command, folder, is_alone=True, disk=(small, kib))


def signals(stream: Random, originals: Originals, folder: Path) -> Case:
    """One or two signals at any moment of a start."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    first = stream.uniform(0.0, 2.5)
    sent = [(first, stream.choice(numbers))]
    if stream.random() < 0.5:
        sent.append((stream.choice([0.0, 0.05, 0.5]), stream.choice(numbers)))
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=30"]
    command += ["--set", f"data.cache_dir={folder / 'cache'}"]
    return Case(f"train, {[signal.Signals(n).name for _, n in sent]} after {first:.2f} s", command, folder, signals=tuple(sent))


# Kind → how it is drawn, and its share of the cases.
KINDS: dict[str, tuple[Draw, int]] = {
    "recipe": (recipe, 30),
    "chain": (chain, 2),
    "set": (setting, 20),
    "number": (number, 6),
    "path": (path, 10),
    "data": (data, 8),
    "tokenizer": (tokenizer, 3),
    "run folder": (run_folder, 14),
    "environment": (environment, 4),
    "limits": (limits, 4),
    "disk": (disk, 1),
    "signals": (signals, 2),
}
