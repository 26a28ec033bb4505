"""The curves of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from trainer.track.console import EVAL_WORDS
from trainer.track.history import Column
from trainer.track.plots import STAND_IN, Plot, downsample, in_words, logarithmic, new_axes, plot_of, smoothed
from trainer.track.runs import Run
from trainer.track.text import scaled, short

NUM_COLOURS = 8
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5))
MOST_RUNS = NUM_COLOURS * len(DASHES)  # more cannot be told apart

Say = Callable[[float | None], str]
# A run's horizontal and vertical values.
Curve = Callable[[Run], tuple[Column, Column]]


def colour_of(index: int) -> str:
    """Return the page's colour of a run."""
    return f"run-{index % NUM_COLOURS + 1}"


def dash_of(index: int) -> int:
    """Return the number of the way in which a run's line is dashed."""
    return index // NUM_COLOURS


def comparison_figures(runs: Sequence[Run]) -> list[Plot]:
    """Return a plot for each measure that any run has recorded, in reading order."""
    return list(_figures(runs))


def _figures(runs: Sequence[Run]) -> Iterator[Plot]:
    yield from _drawn(runs, "loss", "Training loss", _trained("loss"), short, caption="Running means.", wide=True)
    yield from _drawn(runs, "eval_loss", "Held-out loss", _evaluated("eval_loss"), short, wide=True)
    if len({_tokens_a_step(run) for run in runs} - {None}) > 1:
        yield from _drawn(runs, "eval_loss_tokens", "Held-out loss by tokens", _by_tokens, short, along="tokens")
    for name, (label, say) in EVAL_WORDS.items():
        if name not in ("eval_loss", "eval_perplexity", "eval_majority"):
            yield from _drawn(runs, name.replace("/", "-"), f"Held-out {label}", _evaluated(name), say)
    yield from _drawn(runs, "grad_norm", "Gradient norm", _trained("grad_norm"), short, log=True, caption="Running means.")
    yield from _drawn(runs, "lr", "Learning rate", _recorded("lr"), lambda value: short(value, 3))
    yield from _drawn(runs, "tokens_per_s", "Throughput, tokens/s", _trained("tokens_per_s"), scaled, caption="Running means.")
    yield from _drawn(runs, "memory_gib", "Peak memory, GiB", _recorded("memory_gib"), lambda value: short(value, 3))


def _drawn(
    runs: Sequence[Run],
    name: str,
    title: str,
    curve: Curve,
    say: Say,
    *,
    along: str = "step",
    log: bool = False,
    wide: bool = False,
    caption: str = "",
) -> Iterator[Plot]:
    """Yield the plot, if any run has a finite value."""
    curves = [curve(run) for run in runs]
    if not any(np.isfinite(y).any() for _, y in curves):
        return
    drawings = [new_axes(wide=True, along=along), new_axes(along=along)] if wide else [new_axes(along=along)]
    for axes in drawings:
        for index, (x, y) in enumerate(curves):
            _line(axes, index, x, y)
        if log and all((y[np.isfinite(y)] > 0).all() for _, y in curves):
            logarithmic(axes)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
    alt = " ".join(in_words(f"{title} of {run.name}", x, y, say) for run, (x, y) in zip(runs, curves, strict=True))
    yield plot_of(drawings[0], name, title, alt, caption, narrow=drawings[1] if wide else None)


def _line(axes: Axes, index: int, x: Column, y: Column) -> None:
    x, y = downsample(x, y)
    (line,) = axes.plot(x, y, color=STAND_IN[colour_of(index)], linewidth=1.6, marker="o" if x.size == 1 else "", markersize=5)
    if dashes := DASHES[dash_of(index)]:
        line.set_dashes(dashes)


def _recorded(name: str) -> Curve:
    return lambda run: (run.history["step"], run.history[name])


def _trained(name: str) -> Curve:
    return lambda run: (run.history["step"], smoothed(run.history[name]))


def _evaluated(name: str) -> Curve:
    return lambda run: (run.evaluations["step"], run.evaluations[name])


def _by_tokens(run: Run) -> tuple[Column, Column]:
    rate = _tokens_a_step(run)
    return run.evaluations["step"] * (np.nan if rate is None else rate), run.evaluations["eval_loss"]


def _tokens_a_step(run: Run) -> float | None:
    """Return the tokens of a step, on average."""
    tokens, step = run.history.last("tokens"), run.history.last("step")
    return tokens / step if tokens and step else None
