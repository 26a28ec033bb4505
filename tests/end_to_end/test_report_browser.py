"""The report in a real browser: it shows, in light and in dark, wide and narrow, what its numbers say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.run_folders import SUMMARY, write_run
from trainer.track.comparison import write_comparison
from trainer.track.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the report is not rendered"),
    pytest.mark.timeout(120),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
DARK = "--blink-settings=preferredColorScheme=0"

PLOTS = ["loss", "grad_norm", "lr", "tokens_per_s", "step_time", "memory_gib", "mfu"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("report") / "quickstart", 300, summary=SUMMARY))


def browse(report: Path, *flags: str) -> str:
    assert BROWSER is not None
    profile = f"--user-data-dir={report.parent / 'browser'}"
    command = [BROWSER, *FLAGS, profile, *flags, report.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def screenshot(report: Path, width: int, height: int, *flags: str) -> np.ndarray:
    """Pixels [height, width, 3]."""
    picture = report.parent / "screenshot.png"
    browse(report, f"--screenshot={picture}", f"--window-size={width},{height}", *flags)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def share_of(pixels: np.ndarray, red: int, green: int, blue: int) -> float:
    """How much of the picture has about this colour."""
    return float((np.abs(pixels.astype(int) - (red, green, blue)).max(axis=-1) < 12).mean())


def test_the_browser_builds_every_plot(report: Path) -> None:
    page = browse(report, "--dump-dom")
    assert [name for name in PLOTS if f'id="plot-{name}"' in page] == PLOTS
    assert page.count('role="img"') == len(PLOTS) + 1
    assert "def mean(values):" in page


def test_light_and_dark(report: Path) -> None:
    light = screenshot(report, 1200, 2200)
    dark = screenshot(report, 1200, 2200, DARK)
    assert light.shape == dark.shape == (2200, 1200, 3)
    assert light.mean() > 220
    assert dark.mean() < 60
    # The curves' blue and the step-time parts, as the page's variables name them in each scheme.
    for pixels, curve, backward, optimizer in (
        (light, (0x1F, 0x63, 0xB5), (0x1F, 0x63, 0xB5), (0xE3, 0x9A, 0x3B)),
        (dark, (0x73, 0xB0, 0xF4), (0x4A, 0x8F, 0xDC), (0xE8, 0xAE, 0x5C)),
    ):
        assert share_of(pixels, *curve) > 0.002
        assert share_of(pixels, *backward) > 0.01
        assert share_of(pixels, *optimizer) > 0.002
    assert share_of(dark, 255, 255, 255) < 0.001  # nothing was left with a white ground


def test_a_narrow_screen_has_one_column_and_no_sideways_scrolling(report: Path) -> None:
    pixels = screenshot(report, 500, 2200)
    ground = pixels[5, 5]
    margins = np.concatenate([pixels[:, :8], pixels[:, -8:]], axis=1)
    assert (margins == ground).all(), "something reaches beyond the page"
    assert (pixels[1500:2100] != ground).any(axis=-1).mean() > 0.7  # cards fill the width


def test_a_comparison_fits_a_phone_without_sideways_scrolling(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run-with-a-long-name-{n}", 60, lr=n * 1e-4, summary=SUMMARY) for n in range(1, 13)]
    page = write_comparison(folders, tmp_path / "comparison.html")
    pixels = screenshot(page, 500, 6000)
    margins = np.concatenate([pixels[:, :8], pixels[:, -8:]], axis=1)
    assert (margins == pixels[5, 5]).all(), "something reaches beyond the page"
    assert share_of(screenshot(page, 1200, 2200, DARK), 0x73, 0xB0, 0xF4) > 0.0005, "the first run's curve"
