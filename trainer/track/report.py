"""The report of how a run went, on one page: self-contained HTML, to read offline, print or mail.

The numbers come from `metrics.jsonl`, `evaluations.jsonl`, `summary.json` and `resolved.json` of
the run folder, so a run that still trains, or was killed, has a report too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import RecipeError
from trainer.files.durable import replacing_file
from trainer.redaction import redact
from trainer.run_folder import Entry, Resolved, read_resolved
from trainer.track.console import EVAL_WORDS
from trainer.track.goodput import read_starts, shares_of
from trainer.track.history import History
from trainer.track.jsonl import EVALUATIONS, METRICS, Summary, read_metrics, read_summary
from trainer.track.page import page
from trainer.track.plan_record import rows_of
from trainer.track.text import duration, percent, printable, scaled, short


@dataclass(frozen=True)
class Headline:
    """A number of the page's head. `tone` is "", "good" or "bad"."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Setting:
    """A value of the resolved recipe, with its origin."""

    key: str
    value: str
    origin: str

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder, whole or not at all, and return its path.

    RecipeError if the folder is missing or holds no run, DataError if its files are damaged.
    """
    if not run_dir.is_dir():
        raise RecipeError(f"{run_dir}: no such folder: give the folder of a run (run.dir/run.name)")
    resolved = read_resolved(run_dir / "resolved.json")
    history = History.of(read_metrics(run_dir / METRICS))
    evaluations = History.of(read_metrics(run_dir / EVALUATIONS))
    summary = read_summary(run_dir)
    text = _render(run_dir, resolved, history, evaluations, summary)
    path = run_dir / "report.html"
    with replacing_file(path) as file:
        file.write(text.encode())
    return path


def _render(run_dir: Path, resolved: Resolved, history: History, evaluations: History, summary: Summary) -> str:
    from trainer.track.plots import figures

    settings = list(_settings(resolved["values"]))
    value_of = {key: entry.get("value") for key, entry in resolved["values"].items()}
    exported = evaluations.until(summary.get("best_step"))
    return page("report.html.j2").render(
        name=run_dir.resolve().name,
        description=value_of.get("description") or "",
        facts=list(_facts(history, summary)),
        headlines=list(_headlines(history, exported, summary, value_of, shares_of(read_starts(run_dir)))),
        figures=figures(history, evaluations, clip_norm=value_of.get("train.clip_norm")),
        num_records=history.num_records,
        evaluation_titles=[title for title, _ in _evaluation_columns(evaluations).values()],
        evaluations=list(_evaluation_rows(evaluations)),
        plan=rows_of(summary["plan"]) if "plan" in summary else [],
        sample_prompt=printable(str(summary.get("sample_prompt") or "")),
        sample=printable(str(summary.get("sample") or "")),
        chosen=[setting for setting in settings if setting.origin != "default" and setting.key != "description"],
        sections=_by_section(settings),
        deepspeed=json.dumps(redact(resolved.get("deepspeed_config") or {}), indent=2),
    )


def _facts(history: History, summary: Summary) -> Iterator[str]:
    """Yield the facts in the line under the title."""
    if summary.get("num_params"):
        yield f"{scaled(summary['num_params'])} parameters"
    if summary.get("devices"):
        yield str(summary["devices"])
    if history.has("time"):
        yield f"last step {_date(history['time'][-1])}"


def _headlines(
    history: History,
    evaluations: History,
    summary: Summary,
    value_of: Mapping[str, Any],
    shares: Mapping[str, float],
) -> Iterator[Headline]:
    if history.num_records:
        steps, total = history.last("step"), value_of.get("train.steps")
        early = "; ended by patience" if "ended_early" in summary else ""
        done = steps == total or early
        yield Headline("Steps", f"{steps:.0f}", f"of {total}{early}" if total else "", "good" if done else "")
    final_loss = summary.get("final_loss", history.last("loss"))
    if final_loss is not None:
        broken = int(np.count_nonzero(~np.isfinite(history["loss"])))
        detail = f"{broken} record{'s' if broken > 1 else ''} not finite" if broken else "training, last step"
        yield Headline("Final loss", short(final_loss), detail, "bad" if broken else "")
    if (best_step := summary.get("best_step")) is not None:
        yield Headline("Best step", f"{best_step:.0f}", f"by {value_of.get('checkpoint.best')}; it is exported")
    perplexity = summary.get("eval_perplexity", evaluations.last("eval_perplexity"))
    if perplexity is not None:
        baseline = summary.get("unigram_perplexity")
        detail = f"held-out; unigram baseline {short(baseline)}" if baseline else "held-out"
        tone = "" if not baseline else "good" if perplexity < baseline else "bad"
        yield Headline("Eval perplexity", short(perplexity), detail, tone)
    yield from _of_the_task(evaluations, summary)
    if (rate := history.median("tokens_per_s")) is not None:
        tokens = history.last("tokens")
        yield Headline("Tokens/s", scaled(rate), f"median; {scaled(tokens)} tokens in all" if tokens else "median")
    if (mfu := history.median("mfu")) is not None:
        yield Headline("MFU", percent(mfu), "median; model FLOPs, no recomputation")
    if (memory := history.largest("memory_gib")) is not None:
        yield Headline("Peak memory", f"{memory:.2f} GiB", "of one process")
    wall_s = summary.get("wall_s", _wall_s(history))
    if wall_s is not None:
        step_time = history.median("step_time_s")
        yield Headline("Wall time", duration(wall_s), f"{duration(step_time)} per step, median" if step_time else "")
    if shares:
        yield Headline("Goodput", percent(shares["goodput"]), _elsewhere(shares))
    skipped = summary.get("skipped", history.last("skipped"))
    if skipped is not None:
        yield Headline("Skipped steps", short(skipped), "overflow or not finite", "bad" if skipped else "")


def _date(time: float) -> str:
    """Return seconds since 1970 as a date."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):  # a clock may give a year that no calendar has
        return f"at {time:g}"


def _elsewhere(shares: Mapping[str, float]) -> str:
    """Return the three largest shares of the time in which nothing was trained."""
    others = {kind: shares[kind] for kind in ("init", "save", "evaluation", "guard", "export", "lost", "other")}
    largest = sorted(others, key=lambda kind: -others[kind])[:3]
    return "time that trained; " + ", ".join(f"{kind} {percent(others[kind])}" for kind in largest)


def _wall_s(history: History) -> float | None:
    """Return the time from the start of the first recorded step to the end of the last [s], pauses
    between attempts included."""
    if not history.has("time"):
        return None
    first_step = history["step_time_s"][0]
    return float(history["time"][-1] - history["time"][0] + (first_step if np.isfinite(first_step) else 0.0))


def _of_the_task(evaluations: History, summary: Summary) -> Iterator[Headline]:
    """Yield the measures of classes, pairs and translations."""
    accuracy, majority = evaluations.last("eval_accuracy"), evaluations.last("eval_majority")
    if accuracy is not None and majority is not None:
        tone = "good" if accuracy > majority else "bad"
        yield Headline("Eval accuracy", percent(accuracy), f"held-out; commonest class {percent(majority)}", tone)
    if (rewards := evaluations.last("eval_rewards/accuracies")) is not None:
        yield Headline("Reward accuracy", percent(rewards), "held-out pairs in order", "good" if rewards > 0.5 else "bad")
    if (bleu := summary.get("bleu")) is not None:
        yield Headline("BLEU", f"{bleu:.1f}", f"chrF {short(summary.get('chrf'))}" if "chrf" in summary else "")


def _evaluation_columns(evaluations: History) -> dict[str, tuple[str, Callable[[float], str]]]:
    """Return the title of each column and the format of its values."""
    measured = {key: (_capital(label.removeprefix("eval ")), say) for key, (label, say) in EVAL_WORDS.items()}
    columns = {"step": ("Step", lambda step: f"{step:.0f}"), **measured, "eval_targets": ("Targets", scaled)}
    return {key: words for key, words in columns.items() if evaluations.last(key) is not None}


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _evaluation_rows(evaluations: History) -> Iterator[list[str]]:
    """Yield the last evaluations as rows; the plot has them all."""
    columns = _evaluation_columns(evaluations)
    for i in range(max(0, evaluations.num_records - 20), evaluations.num_records):
        values = {key: evaluations[key][i] for key in columns}
        yield [columns[key][1](value) if np.isfinite(value) else "–" for key, value in values.items()]


def _settings(values: Mapping[str, Entry]) -> Iterator[Setting]:
    for key, entry in values.items():
        value = redact(entry.get("value"), key)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield Setting(key, printable(text), str(entry.get("origin", "")))


def _by_section(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    sections: dict[str, list[Setting]] = {}
    for setting in settings:
        sections.setdefault(setting.section, []).append(setting)
    return sections
