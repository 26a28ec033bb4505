"""The plan's three lines, as `check` shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main

ROOT = Path(__file__).parents[2]
LARGE, SMALL = (str(ROOT / "ds_configs" / f"{name}.json") for name in ("llama_70b_3d", "gpt2_pretrain"))


def checked(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["check", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]
    return found


def planned(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) in (0, 78)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("device", "fits"), [("h100-80g", True), ("rtx4090", False)])
def test_check_says_what_plan_says(device: str, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Also that it does not fit: the recipe is right, and the machine may be another."""
    ours = checked(LARGE, "--world-size", "64", "--device", device, capsys=capsys)
    plan = planned(LARGE, "--gpus", "64", "--device", device, capsys=capsys)
    assert ours["fits"] is fits
    assert ours["rank_bytes"] == [rank["peak"]["device"] for rank in plan["ranks"]]
    assert (ours["step_s"], ours["mfu"]) == (plan["step"]["step_s"], plan["step"]["mfu"])


def test_the_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", LARGE, "--world-size", "64", "--device", "h100-80g"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("fits: ")]
    memory, time = lines[first + 1 : first + 3]
    assert memory.startswith("memory: ")
    assert memory.endswith(" GiB on the ranks of the pipeline")
    assert time.startswith("time: ")
    assert " for a step ± 20%; " in time


def test_without_a_world_size_the_plan_is_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    ours = checked(LARGE, "--device", "h100-80g", capsys=capsys)
    assert ours == checked(LARGE, "--world-size", "32", "--device", "h100-80g", capsys=capsys)


def test_the_device_of_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.json"
    site.write_text('{"device": "a100-40g"}')
    assert checked(SMALL, "--site", str(site), capsys=capsys)["device"] == "a100-40g"
    assert checked(SMALL, "--site", str(site), "--device", "h200", capsys=capsys)["device"] == "h200"


def test_of_an_unknown_device_there_is_the_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = checked(SMALL, capsys=capsys)
    assert (found["device"], found["fits"], found["step_s"]) == (None, None, None)
    assert main(["check", SMALL]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert line.endswith("no device is known, which --device or a site's file names: no verdict and no time")


def test_a_device_without_a_sheet_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SMALL, "--device", "a100"]) == 78
    assert "--device a100: no sheet has this name; did you mean a100-40g or a100-80g?" in capsys.readouterr().err
