"""Hostile recipes: their values, their text, chains of them, settings and paths over them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tools.campaign.hostile_cases import (
    ODD_NUMBERS,
    ODD_TEXTS,
    ODD_VALUES,
    Case,
    Originals,
    Random,
    places,
    spoilt,
    spoilt_text,
)
from trainer.schema import Recipe


def recipe(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw a recipe whose values or bytes are spoilt; it is checked, or also started."""
    path = folder / "recipe.json"
    if stream.random() < 0.7:
        given = _whole_recipe(originals) if stream.random() < 0.5 else originals.recipe
        path.write_text(json.dumps(spoilt(stream, given)))
    else:
        path.write_bytes(spoilt_text(stream, json.dumps(originals.recipe).encode()))
    words = stream.choice([["check"], ["check", "--world-size", "4"], ["check", "--json"], ["schedule"], SUBMIT])
    return Case("a spoilt recipe", [words[0], str(path), *words[1:]], folder)


SUBMIT = ["submit", "--nodes", "1", "--ranks-per-node", "2", "--dry-run"]


def _whole_recipe(originals: Originals) -> dict[str, Any]:
    """Return every key with its default, or with what the recipe says."""
    found: dict[str, Any] = Recipe.model_validate(originals.recipe).model_dump()
    return found


def chain(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw recipes that extend others: long chains, circles, pipes, devices, missing files."""
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
    """Draw an odd --set."""
    keys = [".".join(map(str, path)) for path in places(_whole_recipe(originals)) if path]
    key = stream.choice(
        [*keys, "data.sources[0].path", "data.sources[99].path", "", "a..b", "model.config.x", "[0]", "é", "a\udcff"]
    )
    value = stream.choice([*map(json.dumps, ODD_VALUES), *ODD_TEXTS, "\udcff\udcfe", "[" * 3000, '{"a":' * 3000])
    if "\0" in value or "\0" in key:  # the system accepts no such argument
        value = value.replace("\0", "")
    return Case(f"--set {key[:40]}", ["check", str(originals.folder / "recipe.json"), "--set", f"{key}={value}"], folder)


def _numbers() -> list[str]:
    keys = []
    for path in places(Recipe().model_dump()):
        value: Any = Recipe().model_dump()
        for part in path:
            value = value[part]
        if isinstance(value, int | float) and not isinstance(value, bool):
            keys.append(".".join(map(str, path)))
    return keys


NUMBERS = _numbers()


def number(stream: Random, originals: Originals, folder: Path) -> Case:
    """Draw a number at the edge of what the schema allows, or beyond; the run is started."""
    key, value = stream.choice(NUMBERS), stream.choice(ODD_NUMBERS)
    command = ["train", str(originals.folder / "recipe.json"), "--run-dir", str(folder / "run"), "--set", "train.steps=1"]
    if stream.random() < 0.4:
        command += ["--set", f"zero.stage={stream.choice([1, 2, 3])}"]
    return Case(f"{key} = {value}", [*command, "--set", f"{key}={json.dumps(value)}"], folder, ranks=stream.choice([1, 1, 2]))


# -------------------------------------------------------------------------------------------- paths


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
    """Draw a path of the recipe or of the command line that leads to something odd."""
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
