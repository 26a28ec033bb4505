"""Which device is planned for, and what is said where a plan does not fit it."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.commands.network import known_network
from trainer.errors import RecipeError
from trainer.planner.devices import device
from trainer.planner.prediction import predict
from trainer.planner.verdict import chosen_device, require_fit, this_machine, verdict
from trainer.recipe import load

ROOT = Path(__file__).parents[2]
LARGE = str(ROOT / "ds_configs" / "llama_70b_3d.json")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a program nvidia-smi, and a machine that no sheet is of."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return tmp_path / "nvidia-smi"


def answers(driver: Path, said: str, code: int = 0) -> None:
    driver.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {code}\n")
    driver.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "code", "name"),
    [
        (r"NVIDIA H100 80GB HBM3, 81559\n" * 8, 0, "h100-80g"),
        (r"Tesla V100-SXM2-16GB, 16160\n", 0, "v100-16g"),
        (r"NVIDIA GeForce GTX 1080, 8111\n", 0, None),
        (r"No devices were found\n", 6, None),
        (r"NVIDIA H100 80GB HBM3, [N/A]\n", 0, None),
        ("", 0, None),
    ],
)
def test_this_machine_is_what_its_driver_says(driver: Path, said: str, code: int, name: str | None) -> None:
    answers(driver, said, code)
    found = chosen_device(None)
    assert (found.name if found else None) == name


def test_what_is_named_goes_before_what_is_here(driver: Path) -> None:
    answers(driver, r"NVIDIA H100 80GB HBM3, 81559\n")
    assert chosen_device("h200", "a100-40g") == device("h200")
    assert chosen_device(None, "a100-40g") == device("a100-40g")
    assert chosen_device(None, looks_here=False) is None


def test_ranks_on_cpus_have_no_gpu(driver: Path) -> None:
    answers(driver, r"NVIDIA H100 80GB HBM3, 81559\n")
    assert this_machine({"DS_ACCELERATOR": "cpu", "XDG_CONFIG_HOME": str(driver.parent)}) is None


def test_the_figures_of_another_machine_are_not_this_one_s(tmp_path: Path) -> None:
    sheet = tmp_path / "triaxis" / "here.json"
    sheet.parent.mkdir()
    sheet.write_text(json.dumps({"measured": {"machine": {"host": platform.node() + "-other"}}}))
    assert this_machine({"DS_ACCELERATOR": "cpu", "XDG_CONFIG_HOME": str(tmp_path)}) is None


def test_an_unknown_device_gets_no_verdict() -> None:
    resolved = load(LARGE)
    network = known_network(resolved)
    assert network is not None
    prediction = predict(resolved.recipe, network, 64, None)
    assert verdict(prediction) == ""
    require_fit(resolved, network, prediction)


def test_what_does_not_fit_is_refused() -> None:
    resolved = load(LARGE)
    network = known_network(resolved)
    assert network is not None
    require_fit(resolved, network, predict(resolved.recipe, network, 64, device("h100-80g")))
    with pytest.raises(RecipeError, match=r"does not fit: .* GiB on the fullest rank .*rtx4090 has 24 GiB"):
        require_fit(resolved, network, predict(resolved.recipe, network, 64, device("rtx4090")))


def test_the_site_names_its_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.json"
    site.write_text('{"device": "h200"}')
    assert main(["plan", LARGE, "--gpus", "64", "--site", str(site)]) == 0
    assert "h200 has 141 GiB" in capsys.readouterr().out
    site.write_text('{"device": "h20"}')
    assert main(["plan", LARGE, "--gpus", "64", "--site", str(site)]) == 78
    assert "the site's device h20: no sheet has this name; did you mean h200?" in capsys.readouterr().err
