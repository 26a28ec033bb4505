"""Hostile files: data, tokenizers, and the folder of a run that was edited."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.campaign.damage import sealed, truncated
from tools.campaign.hostile_cases import (
    Case,
    Originals,
    Random,
    spoilt,
    spoilt_text,
)
from trainer.checkpoint.manifest import MANIFEST

# --------------------------------------------------------------------------------------------- data

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
    """Draw a file of data that is damaged, of another kind than its name says, or no file; it is
    tokenized."""
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
        content = stream.choice([spoilt_text(stream, content), content.split(b"\n")[0] + b"\n", b"\n" * 50, b""])
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
    """Draw a tokenizer's folder with a hostile template, a regular expression that explodes, or
    spoilt files."""
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


# -------------------------------------------------------------------------------------- run folders


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
        path.write_bytes(spoilt_text(stream, content) if content else b"x")


def _another_thing(stream: Random, path: Path) -> None:
    path.unlink()
    ways: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        # A hole that claims a terabyte.
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
    )
    stream.choice(ways)()


def run_folder(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw a run of which one file, or its tokenized data, was edited, sealed again, or replaced,
    and a command that reads it."""
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
