"""Rules of the data, as a user meets them: what the start says, and runs that began under other rules."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.campaign.cases import WAYS, arguments, numbers, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.cli import main
from trainer.recipe.earlier import in_todays_keys

ONE = WAYS[0]
THEN = ("data.tails=drop", "data.sources[0].weight=1.0", "data.sources[1].weight=1.0")


def run(recipe: Path, run_dir: Path, *keys: str, resume: str = "auto") -> Ended:
    ended = run_ranks(train, arguments(recipe, run_dir, ONE, *keys, resume=resume), world_size=1, log=run_dir.parent / "log")
    assert ended.codes == (0,), ended.said
    return ended


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one much smaller than the other, and neither a whole number of sequences."""
    folder = tmp_path_factory.mktemp("rules")
    for name, rows in (("large", 200), ("small", 6)):
        lines = [json.dumps({"text": f"{name} {n} squared is {n * n}"}) for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [{"path": str(folder / f"{name}.jsonl")} for name in ("large", "small")]
    return write_recipe(folder, steps=4, every=2, keep=9, data={"sources": sources})


@pytest.fixture(scope="module")
def earlier(recipe: Path) -> Path:
    """A run as a version left it that had none of these keys: half of each source, and no tails."""
    run_dir = recipe.parent / "earlier"
    run(recipe, run_dir, *THEN)
    resolved = json.loads((run_dir / "resolved.json").read_text())
    for key in THEN:
        name = key.partition("=")[0]
        resolved["values"][name]["origin"] = "default"
    del resolved["values"]["data.tails"]
    for source in (0, 1):
        resolved["values"][f"data.sources[{source}].field"]["value"] = "text"
    (run_dir / "resolved.json").write_text(json.dumps(resolved))
    for checkpoint in (run_dir / "checkpoints").iterdir():
        manifest = Manifest.read(checkpoint)
        del manifest.recipe["data"]["tails"]
        for source in manifest.recipe["data"]["sources"]:
            source["field"] = "text"
        (checkpoint / MANIFEST).write_bytes(manifest.encode())
    return run_dir


def values_of(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "resolved.json").read_text())["values"]
    return values


def test_sources_are_taken_by_size_and_the_start_says_it(recipe: Path, tmp_path: Path) -> None:
    said = run(recipe, tmp_path / "run").said
    texts = {
        name: [json.loads(line)["text"] for line in (recipe.parent / name).read_text().splitlines()]
        for name in ("large.jsonl", "small.jsonl")
    }
    tokens = {name: sum(len(text) + 1 for text in rows) for name, rows in texts.items()}  # each with the end of a document
    sequences = {name: math.ceil((count - 1) / 32) for name, count in tokens.items()}
    passes = 4 * 8 / sum(sequences.values())
    for name, count in sequences.items():
        share = count / sum(sequences.values())
        line = f"{name}: {count} sequences, {share:.1%} of the steps, {passes:.3g} passes in 4 steps"
        assert f"data: {recipe.parent / line}" in said
    assert "keeps the rules" not in said
    assert values_of(tmp_path / "run")["data.tails"] == {"value": "train", "origin": "default"}
    again = run(recipe, tmp_path / "run", "train.steps=5").said
    assert "resumed after step 4" in again
    assert "keeps the rules" not in again


def test_a_run_that_began_with_other_rules_keeps_them(recipe: Path, earlier: Path, tmp_path: Path) -> None:
    """To the bit, in its own folder again and again, and from a checkpoint of it in another one."""
    undisturbed = numbers(earlier)
    own = Path(shutil.copytree(earlier, tmp_path / "own"))
    shutil.rmtree(own / "checkpoints" / "step-00000004")
    said = run(recipe, own).said
    assert f'the run in {own} keeps the rules that it began with: data.sources[].weight = 1.0, data.tails = "drop"' in said
    assert "50.0% of the steps" in said
    assert 'data.tails "drop" leaves out its last' in said
    assert numbers(own) == undisturbed
    assert values_of(own)["data.tails"] == {"value": "drop", "origin": "earlier version"}
    assert values_of(own)["data.sources[1].weight"] == {"value": 1.0, "origin": "earlier version"}
    assert "keeps the rules" in run(recipe, own, "train.steps=5").said, "also what it wrote itself says so"
    for checkpoint in (earlier / "checkpoints" / "step-00000002", own / "checkpoints" / "step-00000002"):
        other = tmp_path / f"from-{checkpoint.parents[1].name}"
        assert f"{checkpoint} keeps the rules" in run(recipe, other, resume=str(checkpoint)).said
        assert numbers(other, after=2) == numbers(own, after=2)[:2] == undisturbed[2:]


def test_a_run_that_learned_all_of_a_single_text_goes_on_with_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"{n} squared is {n * n}\n" for n in range(200)))
    recipe = write_recipe(
        tmp_path, steps=4, every=2, keep=9, data={"sources": [{"path": str(tmp_path / "one.txt")}], "eval_fraction": 0.02}
    )
    run_dir = tmp_path / "run"
    run(recipe, run_dir, "data.hold_out_tail=false")
    resolved = json.loads((run_dir / "resolved.json").read_text())
    del resolved["values"]["data.hold_out_tail"]  # as a version without the key left it
    (run_dir / "resolved.json").write_text(json.dumps(resolved))
    said = run(recipe, run_dir, "train.steps=5").said
    assert "keeps the rules that it began with: data.hold_out_tail = false" in said
    assert "resumed after step 4" in said
    assert "so nothing of it is held out" in said


def test_what_the_recipe_writes_is_done_or_refused(recipe: Path, earlier: Path) -> None:
    command = arguments(recipe, earlier, ONE, "data.tails=train", "train.steps=5")
    ended = run_ranks(train, command, world_size=1, log=earlier.parent / "log")
    assert ended.codes == (78,)
    assert "data.samples" in ended.said


def test_a_checkpoint_of_an_earlier_version_is_evaluated(
    recipe: Path, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = earlier / "checkpoints" / "step-00000004"
    saved = Manifest.read(checkpoint).recipe
    found = in_todays_keys(saved)["data"]
    assert (found["tails"], [source["field"] for source in found["sources"]]) == ("drop", [None, None])
    assert "tails" not in saved["data"]
    assert in_todays_keys({**saved, "data": found})["data"] == found, "a recipe of today stays as it is"
    assert main(["eval", str(checkpoint), str(recipe.parent / "small.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"] > 100
