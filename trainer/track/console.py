"""The console: a live bar on a terminal, plain lines in a log file.

In a SLURM log a bar would be thousands of lines of control characters. There each record is one
line, at most one every two seconds, but always the first and the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trainer.redaction import redact_text
from trainer.track.run_info import RunInfo
from trainer.track.text import duration, percent, printable, scaled, short

LINE_EVERY_S = 2.0

Record = Mapping[str, float | int | None]


class ConsoleTracker:
    """The tracker that writes to stdout. `note` may be called from any thread, and before
    `start`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._waiting: Record | None = None
        self._next_line = 0.0

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._pace = _Pace(run)
        resumed = f", resumed after step {run.start_step}" if run.start_step else ""
        self.note(f"{run.name}: {run.total_steps} steps on {run.devices}{resumed} → {run.folder}")

    def log(self, record: Record) -> None:
        self._pace.record(record)
        if self._console.is_terminal:
            self._move_bar(record)
            return
        self._waiting = record
        if time.monotonic() >= self._next_line:
            self._write_waiting()

    def evaluate(self, record: Record) -> None:
        self._write_waiting()
        measured = ", ".join(f"{label} {say(record[key])}" for key, (label, say) in EVAL_WORDS.items() if key in record)
        self.note(f"step {record['step']}: {measured}")

    def rewind(self, step: int) -> None:
        """Do nothing: the bar goes back with the next record."""

    def note(self, line: str) -> None:
        self._console.print(Text(printable(redact_text(line))), soft_wrap=True)

    def finish(self, summary: Mapping[str, object]) -> None:
        self._write_waiting()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        rows = list(summary_rows(summary))
        if rows:
            self._console.print(_table(rows))
        if sample := summary.get("sample"):
            self.note(f"{summary.get('sample_prompt') or ''}{sample}")

    def _move_bar(self, record: Record) -> None:
        # Not before the first step: earlier errors find the terminal unchanged.
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
        loss, rate = short(record.get("loss")), scaled(record.get("tokens_per_s"))
        self._bar.update(self._bar.task_ids[0], completed=record["step"], loss=loss, rate=rate)

    def _make_bar(self) -> Progress:
        bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            _Remaining(self._pace),
            console=self._console,
            expand=True,
        )
        bar.add_task("", total=self._run.total_steps, completed=self._run.start_step, loss="–", rate="–")
        return bar

    def _write_waiting(self) -> None:
        record, self._waiting = self._waiting, None
        if record is None:
            return
        self._next_line = time.monotonic() + LINE_EVERY_S
        parts = [
            f"step {record['step']}/{self._run.total_steps}",
            f"loss {short(record.get('loss'))}",
            f"grad norm {short(record.get('grad_norm'), 3)}",
            f"lr {short(record.get('lr'), 3)}",
            f"{scaled(record.get('tokens_per_s'))} tokens/s",
            f"ETA {duration(self._pace.remaining_s())}",
        ]
        if record.get("skipped"):
            parts.append(f"{record['skipped']} skipped")
        self.note(" · ".join(parts))


class _Pace:
    """An estimate of when the run will end, from a running mean of the step time, so that slow
    first steps (compilation) soon lose weight."""

    def __init__(self, run: RunInfo) -> None:
        self._total, self._step = run.total_steps, run.start_step
        self._step_time_s: float | None = None

    def record(self, record: Record) -> None:
        self._step = int(record["step"] or 0)
        took = record.get("step_time_s")
        if took is not None:
            self._step_time_s = took if self._step_time_s is None else 0.9 * self._step_time_s + 0.1 * took

    def remaining_s(self) -> float | None:
        return None if self._step_time_s is None else max(0, self._total - self._step) * self._step_time_s


class _Remaining(ProgressColumn):
    """A column with our estimate: Rich's own forgets after 30 s and shows nothing for slower
    steps."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(f"ETA {duration(self._pace.remaining_s())}")


# Key of an evaluation → its name and format in a line.
EVAL_WORDS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "eval_loss": ("eval loss", short),
    "eval_perplexity": ("perplexity", short),
    "eval_bits_per_byte": ("bits per byte", short),
    "eval_accuracy": ("accuracy", percent),
    "eval_exact_match": ("exact match", percent),
    "eval_majority": ("commonest class", percent),
    "eval_f1": ("macro F1", percent),
    "eval_rewards/margins": ("reward margin", short),
    "eval_rewards/accuracies": ("reward accuracy", percent),
    "eval_bleu": ("BLEU", short),
    "eval_chrf": ("chrF", short),
}

# Key of the summary → its name and format, in the order of the table. Other keys are for the report
# only.
SUMMARY_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", scaled),
    "final_loss": ("final loss", short),
    "best_step": ("best step, which is exported", scaled),
    "eval_loss": ("eval loss", short),
    "eval_perplexity": ("eval perplexity", short),
    "eval_bits_per_byte": ("eval bits per byte", short),
    "eval_accuracy": ("eval accuracy", percent),
    "eval_majority": ("  of the commonest class", percent),
    "eval_f1": ("eval F1, mean over classes", percent),
    "eval_f1_positive": ("  of the second class", percent),
    "eval_rewards/margins": ("eval reward margin", short),
    "eval_rewards/accuracies": ("eval reward accuracy", percent),
    "bleu": ("BLEU", short),
    "chrf": ("chrF", short),
    "unigram_perplexity": ("  of word counts alone (unigram)", short),
    "tokens": ("tokens", scaled),
    "tokens_per_s": ("tokens/s", scaled),
    "mfu": ("MFU", percent),
    "memory_gib": ("peak memory", lambda gib: f"{gib:.2f} GiB"),
    "skipped": ("skipped steps", short),
    "num_params": ("parameters", scaled),
    "wall_s": ("wall time", duration),
    "goodput": ("  of the time given, trained", percent),
}


def summary_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return (name, formatted number) for each number of the summary that a person wants to see."""
    rows = []
    for key, (label, say) in SUMMARY_ROWS.items():
        value = summary.get(key)
        if isinstance(value, int | float):
            rows.append((label, say(value)))
    return rows


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    return table
