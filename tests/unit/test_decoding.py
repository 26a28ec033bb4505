"""Files of a run that somebody edited, sealed again or replaced: they are what they were declared to be, or one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typing_extensions import TypedDict

from tests.unit.checkpoints import write_checkpoint
from tests.unit.stores import make_store
from tools.campaign.damage import sealed
from tools.campaign.hostile_cases import spoilt
from trainer.checkpoint.listing import survey
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.cluster.lease import HOLDER, _read, _start_in
from trainer.data.store import TokenStore, _header_hash
from trainer.errors import DataError
from trainer.files.decoding import decode, read_as
from trainer.run_folder import read_resolved
from trainer.track.goodput import read_starts, shares_of
from trainer.track.jsonl import read_metrics, read_summary

SEEDS = range(300)
T = TypeVar("T")


def attempted(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or the one line that says why it is damaged."""
    try:
        return read(), ""
    except DataError as error:
        (line,) = error.lines
        return None, line


class Point(TypedDict):
    x: int
    names: list[str]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"x": 1.5, "names": []}', "x: input should be a valid integer"),
        ('{"x": 1, "names": ["a", 2]}', "names.1: input should be a valid string"),
        ('{"x": "1", "names": 3}', r"x: input should be a valid integer \(and 1 more\)"),
        ('{"names": []}', "x: field required"),
        ("[]", "input should be an object"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_of_another_type_is_said_with_its_place(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_as(Point, tmp_path / "it.json")
    assert decode(Point, {"x": 1, "names": ["a"]}) == {"x": 1, "names": ["a"]}


def test_a_manifest_that_was_sealed_again_is_sound_or_damaged(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 3)
    body = json.loads((checkpoint / MANIFEST).read_bytes())
    outcomes = set()
    for seed in SEEDS:
        (checkpoint / MANIFEST).write_bytes(sealed(spoilt(random.Random(seed), body)))
        again, refused = attempted(lambda: Manifest.read(checkpoint))
        assert refused == "" or refused.startswith(f"{checkpoint / MANIFEST}: damaged (")
        assert again is None or Manifest.decode(again.encode()) == again
        outcomes.add("damaged" if refused else "sound")
        assert survey(tmp_path, verify=False).table().row_count == 1
    assert outcomes == {"damaged", "sound"}, "a text or a number may be another one"


def test_so_is_the_header_of_a_token_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "source" / "main", [3, 1, 6])
    header = json.loads((store.path / "header.json").read_text())
    del header["sha256"]
    outcomes = set()
    for seed in SEEDS:
        changed = spoilt(random.Random(seed), header)
        if isinstance(changed, dict):
            changed = changed | {"sha256": _header_hash(changed)}
        (store.path / "header.json").write_text(json.dumps(changed))
        again, refused = attempted(lambda: TokenStore.open(store.path, verify="full"))
        assert again is None or len(again.slice(0, 10)) == 10
        assert refused == "" or str(store.path) in refused
        outcomes.add("damaged" if refused else "sound")
    assert outcomes == {"damaged", "sound"}


RECORD = {"step": 2, "loss": 2.5, "time": 1.7e9, "lr": None}
START = {"began": 1.0, "until": 3.0, "from_step": 0, "to_step": 2, "seconds": {"compute": 1.0}, "lost_s": 0.5}


def _held(folder: Path) -> None:
    _start_in(_read(folder / HOLDER))


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("summary.json", {"steps": 3, "final_loss": 2.5, "ended_by": "x", "bleu": 1.5}, lambda folder: read_summary(folder)),
        ("metrics.jsonl", RECORD, lambda folder: read_metrics(folder / "metrics.jsonl")),
        ("evaluations.jsonl", {"step": 2, "eval_loss": 2.0}, lambda folder: read_metrics(folder / "evaluations.jsonl")),
        ("goodput.json", {"starts": [START]}, lambda folder: shares_of(read_starts(folder))),
        (HOLDER, {"job": "1", "restarts": 2, "host": "a", "pid": 3}, _held),
        (
            "resolved.json",
            {"values": {"train.clip_norm": {"value": 1.0, "origin": "default"}, "train.steps": {"value": 3, "origin": "x"}}},
            lambda folder: read_resolved(folder / "resolved.json"),
        ),
    ],
)
def test_so_is_what_a_run_says_of_itself(
    name: str, value: dict[str, Any], read: Callable[[Path], object], tmp_path: Path
) -> None:
    for seed in SEEDS:
        (tmp_path / name).write_text(json.dumps(spoilt(random.Random(seed), value)) + "\n")
        _, refused = attempted(lambda: read(tmp_path))
        assert refused == "" or str(tmp_path / name) in refused
