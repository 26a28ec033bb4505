"""Each path of a recipe is resolved once, or refused in one line; so is each path of a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.errors import RecipeError
from trainer.files.paths import occupied, wrong_with
from trainer.recipe import load
from trainer.recipe.names import PATHS
from trainer.recipe.wording import json_schema

NO_PATH = [
    ("s3://bucket/runs", r"an address \(s3://\)"),
    ("HTTPS://host/x", r"an address \(HTTPS://\)"),
    ("file:///tmp/x", "write the path alone"),
    ("a\0b", "a NUL character"),
    ("~nobody-of-that-name/x", "the home of no user here"),
    ("a" * 256, "too long"),
    ("é" * 128, "too long"),
    ("a/" * 2000, "too long"),
]
NETWORK = {"family": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}}


@pytest.mark.parametrize(("name", "says"), NO_PATH)
def test_what_is_no_path_is_said(name: str, says: str) -> None:
    assert says.replace("\\", "") in wrong_with(name)


@pytest.mark.parametrize(
    "name", ["runs", "/a/b", "~", "~/x", "a b", "c:/x", "é" * 127, "a" * 255, "./://", "owner/name", "s3:x"]
)
def test_what_may_be_one_is_let_through(name: str) -> None:
    assert wrong_with(name) == ""


def with_value(key: str, value: str) -> dict[str, Any]:
    """A recipe that has this value under that dotted key."""
    recipe: dict[str, Any] = {"model": {**NETWORK}, "data": {"seq_len": 16, "sources": [{"path": "stdlib"}]}}
    recipe["data"]["eval_sources"] = [{"path": "stdlib"}]
    here: Any = recipe
    *parts, last = key.replace("[]", ".0").split(".")
    for part in parts:
        here = here[int(part)] if part.isdecimal() else here.setdefault(part, {})
    here[last] = value
    return recipe


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_recipe_is_looked_at(key: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(with_value(key, "s3://bucket/x")))
    with pytest.raises(RecipeError, match=r"is an address \(s3://\)"):
        load(tmp_path / "recipe.json")


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "data.sources[].path"])
def test_the_home_folder_is_put_in(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "it").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "recipe.json").write_text(json.dumps(with_value(key, "~/it")))
    values = load(tmp_path / "recipe.json").as_resolved_json()["values"]
    assert values[key.replace("[]", "[0]")]["value"] == str(tmp_path / "home" / "it")
    assert values[key.replace("[]", "[0]")]["origin"].startswith("file ")


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir"])
def test_a_file_in_the_way_of_a_folder_is_named(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below/it"):
        (tmp_path / "recipe.json").write_text(json.dumps(with_value(key, str(tmp_path / name))))
        with pytest.raises(RecipeError, match=f"{tmp_path}/file is a file"):
            load(tmp_path / "recipe.json")
    assert occupied(str(tmp_path / "new" / "folder")) == ""


def test_no_key_that_names_a_path_is_forgotten() -> None:
    """Of the schema's texts those are paths that say so in their name; a new one belongs into PATHS."""
    named = {
        key
        for key in _texts(json_schema())
        if key.rpartition(".")[2] in ("dir", "path", "target_path", "nvme_path", "cache_dir")
    }
    assert named <= set(PATHS)
    names_too = {"data.tokenizer", "data.chat_template", "model.from_pretrained", "parallel.schedule"}
    assert set(PATHS) - named == names_too


def _texts(schema: dict[str, Any]) -> set[str]:
    found = set()

    def walk(node: dict[str, Any], key: str) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        for inner in node.get("anyOf", ()):
            walk(inner, key)
        if node.get("type") == "string":
            found.add(key)
        if "items" in node:
            walk(node["items"], f"{key}[]")
        for name, inner in node.get("properties", {}).items():
            walk(inner, f"{key}.{name}" if key else name)

    walk(schema, "")
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["check", "s3://x"],
        ["train", "r.json", "--run-dir", "s3://x"],
        ["train", "r.json", "--resume", "s3://x"],
        ["report", "s3://x"],
        ["checkpoints", "s3://x"],
        ["export", "s3://x", "out"],
        ["export", "x", "s3://x"],
        ["eval", "s3://x"],
        ["eval", "x", "s3://x"],
        ["generate", "s3://x", "--prompt", "a"],
        ["data", "inspect", "s3://x"],
        ["submit", "r.json", "--nodes", "1", "--ranks-per-node", "1", "--site", "s3://x"],
    ],
)
def test_so_is_every_path_of_a_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 78
    said = capsys.readouterr().err
    assert "is an address (s3://)" in said
    assert len(said.splitlines()) == 1
