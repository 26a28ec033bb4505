"""The report of every kind of run: finished, killed, empty, broken, huge."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.run_folders import SUMMARY, write_run
from trainer.errors import DataError, RecipeError
from trainer.track.plots import MAX_POINTS, bucket_means, downsample, smoothed
from trainer.track.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The parsed page: its texts, its elements, and that every element is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []
        self.ids = [value for _, attributes in self.elements if (value := attributes.get("id"))]
        assert len(self.ids) == len(set(self.ids)), "an id twice in the page"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    @property
    def plots(self) -> list[str]:
        return [name.removeprefix("plot-") for name in self.ids if name.startswith("plot-")]

    def headline(self, label: str) -> tuple[str, str]:
        """(value, detail) of a headline number."""
        found = re.search(
            rf"<dt>{label}</dt>\s*<dd class=\"value\">(.*?)</dd>\s*(?:<dd class=\"detail\">(.*?)</dd>)?", self.source
        )
        assert found, f"no headline {label}"
        return found[1], found[2] or ""


def test_a_finished_run(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "quickstart", 300, summary=SUMMARY)))
    assert page.plots == ["loss", "grad_norm", "lr", "tokens_per_s", "step_time", "memory_gib", "mfu"]
    assert page.headline("Steps") == ("300", "of 300")
    assert page.headline("Final loss") == ("2.1", "training, last step")
    assert page.headline("Eval perplexity") == ("9.03", "held-out; unigram baseline 512.3")
    assert page.headline("Tokens/s")[0] == "38.1 k"
    assert page.headline("Wall time") == ("2 min 9 s", "0.43 s per step, median")
    assert page.headline("Skipped steps")[0] == "0"
    assert "<h1>quickstart</h1>" in page.source
    assert "A run &lt;made&gt; for a test &amp; nothing else." in page.source
    assert "&lt;b&gt;Not markup&lt;/b&gt;" in page.source
    assert "\x1b" not in page.source
    assert "clip at 1" in page.source


def test_a_run_that_exported_its_best_step_shows_that_step_s_figures(tmp_path: Path) -> None:
    early = {"steps": 200, "best_step": 100, "ended_early": "3 evaluations …", "eval_perplexity": 9.03}
    run = write_run(tmp_path, 200, summary=SUMMARY | early)
    measured = [(20 * n, 0.5 + 0.01 * n * (10 - n)) for n in range(1, 11)]
    with (run / "evaluations.jsonl").open("w") as file:
        for step, accuracy in measured:
            file.write(json.dumps({"step": step, "eval_accuracy": accuracy, "eval_majority": 0.5}) + "\n")
    resolved = json.loads((run / "resolved.json").read_text())
    for key, value in {"train.steps": 1000, "checkpoint.best": "eval_accuracy"}.items():
        resolved["values"][key] = {"value": value, "origin": "--set"}
    (run / "resolved.json").write_text(json.dumps(resolved))
    page = Page(write_report(run))
    assert page.headline("Steps") == ("200", "of 1000; ended by patience")
    assert page.headline("Best step") == ("100", "by eval_accuracy; it is exported")
    assert page.headline("Eval accuracy")[0] == "75.0 %"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 50, summary=SUMMARY)))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\((?!#)", page.source)
    assert "@import" not in page.source


def test_every_plot_has_a_text_alternative_and_every_colour_a_variable(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 50)))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == len(page.plots) + 1  # the loss has a second one for narrow screens
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert "at step" in str(attributes["aria-label"]) or "Mean time" in str(attributes["aria-label"])
    variables = set(re.findall(r"var\(--([a-z0-9-]+)\)", page.source))
    assert variables <= set(re.findall(r"--([a-z0-9-]+):", page.source))
    assert "#a000" not in page.source
    assert not re.findall(r"(?:stroke|fill): #", page.source)


def test_every_value_of_the_recipe_with_its_origin_and_without_secrets(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 3)))
    rows = re.findall(r"<code>([\w.]+)</code></th><td class=\"value\">(.*?)</td><td class=\"origin\">(.*?)</td>", page.source)
    assert ("zero.stage", "1", "default") in rows
    assert ("train.steps", "3", "--set") in rows
    assert ("data.cache_dir", "runs/data", "derived") in rows
    assert ("optimizer.lr", "0.0006", "file:r.json") in rows
    assert "hunter2" not in page.source
    assert "&#34;train_batch_size&#34;: 8" in page.source


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, 40, summary=SUMMARY)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def test_no_record_yet(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "evaluations.jsonl").unlink()
    page = Page(write_report(tmp_path))
    assert page.plots == []
    assert "No step has been recorded yet." in page.source


def test_one_record(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 1)))
    assert "loss" in page.plots
    assert page.headline("Steps") == ("1", "of 1")
    assert page.headline("Wall time")[0] == "0.44 s"


def test_a_killed_run_says_how_far_it_came(tmp_path: Path) -> None:
    write_run(tmp_path, 30)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:20]) + lines[20][:30])
    assert Page(write_report(tmp_path)).headline("Steps") == ("20", "of 30")


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    some = write_run(tmp_path / "some", 60, loss=lambda step: math.nan if step % 20 == 0 else 60.0 / step, skipped=3)
    page = Page(write_report(some))
    assert page.headline("Final loss") == ("nan", "3 records not finite")
    assert page.headline("Skipped steps")[0] == "3"
    assert "3 of 60 records have a loss that is not finite" in page.source
    every = write_run(tmp_path / "every", 10, loss=math.inf, grad_norm=math.nan)
    assert "grad_norm" not in Page(write_report(every)).plots


def test_values_that_were_not_recorded_have_no_plot(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 10, mfu=None, memory_gib=None, grad_norm=0.0)))
    assert page.plots == ["loss", "grad_norm", "lr", "tokens_per_s", "step_time"]


def test_the_loss_scale_is_drawn_when_it_moves(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, 20, loss_scale=lambda step: 65536.0 / 2 ** (step // 5))))
    assert page.plots[-1] == "loss_scale"


def test_two_hundred_thousand_records(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    line = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 200_001):
            loss = 900.25 if step == 123_456 else 3.0 + 1 / step
            file.write(f'{{"step": {step}, "loss": {loss}, {line.partition(", ")[2].partition(", ")[2]}')
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_000_000
    assert "highest 900.2" in path.read_text()


def test_what_is_not_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder") as missing:
        write_report(tmp_path / "absent")
    with pytest.raises(RecipeError, match="not a run folder") as empty:
        write_report(tmp_path)
    assert [len(caught.value.lines) for caught in (missing, empty)] == [1, 1]
    assert missing.value.exit_code == 78
    (tmp_path / "resolved.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        write_report(tmp_path)
    (tmp_path / "resolved.json").write_text("[]")
    with pytest.raises(DataError, match="input should be an object"):
        write_report(tmp_path)


# ---------------------------------------------------------------------------------------------------------- numbers


@given(st.integers(0, 9_000), st.integers(0, 2**32 - 1))
def test_downsampling_keeps_ends_extremes_order_and_its_limit(size: int, seed: int) -> None:
    x, y = np.arange(size, dtype=np.float64), np.random.default_rng(seed).normal(size=size)
    y[seed % 7 :: 11] = np.nan
    finite = np.isfinite(y)
    kept_x, kept_y = downsample(x, y)
    assert kept_x.size <= MAX_POINTS
    assert (np.diff(kept_x) > 0).all()
    assert np.array_equal(kept_y, y[kept_x.astype(int)])
    if finite.any():
        assert {kept_x[0], kept_x[-1]} == {x[finite][0], x[finite][-1]}
        assert (kept_y.min(), kept_y.max()) == (y[finite].min(), y[finite].max())


def test_smoothing_is_the_mean_around_and_bends_no_end() -> None:
    line = np.arange(1000, dtype=np.float64)
    assert smoothed(line) == pytest.approx(line)
    spiked = np.zeros(1000)
    spiked[500] = 21.0
    assert smoothed(spiked)[490:511] == pytest.approx(np.ones(21))
    holed = np.where(np.arange(1000) == 500, np.nan, 1.0)
    assert smoothed(holed) == pytest.approx(np.ones(1000))
    assert smoothed(np.array([])).size == 0


def test_bucket_means_keep_the_mean() -> None:
    x = np.arange(960, dtype=np.float64)
    rows = np.stack([x, 2 * x])
    short_x, short_rows = bucket_means(x, rows)
    assert short_rows.shape == (2, 240)
    assert short_rows.mean(axis=1) == pytest.approx(rows.mean(axis=1))
    assert short_rows[1] == pytest.approx(2 * short_x)


def test_a_task_shows_what_it_is_judged_by(tmp_path: Path) -> None:
    """Classes beside the commonest one, translations by BLEU; the table has the columns that were measured."""
    run = write_run(tmp_path / "classes", 20, summary={"bleu": 38.13, "chrf": 62.32})
    measured = {"eval_loss": 0.5, "eval_accuracy": 0.802, "eval_majority": 0.509, "eval_f1": 0.801, "eval_targets": 872}
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 20, **measured}) + "\n")
    page = Page(write_report(run)).source
    for text in ("80.2 %", "commonest class 50.9 %", "38.1", "chrF 62.3", ">Macro F1<", ">80.1 %<", ">872<"):
        assert text in page, text
    assert "Perplexity" not in page
