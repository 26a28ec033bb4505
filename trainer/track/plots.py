"""The report's plots: inline SVG by matplotlib's object interface, coloured by the page, the same
bytes for the same run.

Matplotlib draws with stand-in colours, each of which becomes a CSS variable of the page, so one
drawing serves light, dark and print. Text stays text: it takes the page's font, can be searched,
and scales.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from trainer.track.history import Column, History
from trainer.track.text import percent, scaled, short, tick

MAX_POINTS = 2_000  # per curve: two for each pixel of a wide screen
ROUND = [1, 2, 2.5, 5, 10]  # distances of axis ticks, up to a power of ten
STACK_POINTS = 240  # points of the step-time split: means, not extremes, so that the parts add up

# Stand-in colours → CSS variables of report.html.j2. Any colours that matplotlib does not use
# itself will do.
COLOURS = {
    "#a00001": "ink",
    "#a00002": "faint",
    "#a00003": "grid",
    "#a00004": "bad",
    "#a00011": "curve",
    "#a00012": "curve-thin",
    "#a00013": "eval",
    "#a00021": "part-1",
    "#a00022": "part-2",
    "#a00023": "part-3",
    "#a00024": "part-4",
    "#a00025": "part-5",
    **{f"#a0003{n}": f"run-{n}" for n in range(1, 9)},
}
STAND_IN = {name: colour for colour, name in COLOURS.items()}

STEP_PARTS = (
    ("time_data_s", "data", "part-1"),
    ("time_forward_s", "forward", "part-2"),
    ("time_backward_s", "backward", "part-3"),
    ("time_optimizer_s", "optimizer", "part-4"),
    ("time_other_s", "other", "part-5"),
)

NOISY_LEGEND = [("curve-thin", "each record"), ("curve", "running mean")]


@dataclass(frozen=True)
class Plot:
    """A figure of the page. `alt` says in words what the curve shows."""

    name: str
    title: str
    unit: str
    svg: Markup
    svg_narrow: Markup | None  # for small screens, when `svg` is as wide as the page
    alt: str
    caption: str
    legend: tuple[tuple[str, str], ...]  # (CSS colour, label)


def figures(history: History, evaluations: History, clip_norm: float | None) -> list[Plot]:
    """Return the plots of a run that has recorded anything, in reading order."""
    return [plot for plot in _figures(history, evaluations, clip_norm) if history.num_records]


def _figures(history: History, evaluations: History, clip_norm: float | None) -> Iterator[Plot]:
    if history.has("loss") or evaluations.has("eval_loss"):
        yield _loss(history, evaluations)
    if history.has("grad_norm"):
        yield _grad_norm(history, clip_norm)
    if history.has("rewards/margins"):
        yield _single(history, "rewards/margins", "Reward margin", "chosen − rejected", say=short, noisy=True)
    if history.has("rewards/accuracies"):
        yield _single(history, "rewards/accuracies", "Reward accuracy", "pairs", say=percent, on_axis=percent_tick, noisy=True)
    if history.has("lr"):
        yield _single(history, "lr", "Learning rate", say=lambda value: short(value, 3))
    if history.has("tokens_per_s"):
        yield _single(history, "tokens_per_s", "Throughput", "tokens/s", say=scaled, from_zero=True, noisy=True)
    if any(history.has(name) for name, _, _ in STEP_PARTS):
        yield _step_time(history)
    if history.has("memory_gib"):
        yield _single(history, "memory_gib", "Peak memory", "GiB", say=lambda value: short(value, 3), from_zero=True)
    if history.has("mfu"):
        yield _single(
            history, "mfu", "MFU", "model FLOPs / peak", say=percent, from_zero=True, on_axis=percent_tick, noisy=True
        )
    if history.has("loss_scale") and np.unique(history["loss_scale"]).size > 1:
        yield _single(history, "loss_scale", "Loss scale", say=_whole, log=True, on_axis=_whole)


def _loss(history: History, evaluations: History) -> Plot:
    step, loss, broken = history["step"], history["loss"], history["step"][~np.isfinite(history["loss"])]
    # A phone shows the narrow one, to keep the text readable.
    wide, narrow = new_axes(wide=True), new_axes()
    for axes in (wide, narrow):
        _noisy_curve(axes, step, loss)
        kept = downsample(evaluations["step"], evaluations["eval_loss"])
        axes.plot(*kept, color=STAND_IN["eval"], linewidth=0.8, marker="o", markersize=4.5, markeredgewidth=0)
        _mark(axes, broken)
    legend, caption, alt = [], "", ""
    if history.has("loss"):
        legend += NOISY_LEGEND
    if evaluations.has("eval_loss"):
        legend.append(("eval", "held-out"))
        alt = " " + in_words("Held-out loss", evaluations["step"], evaluations["eval_loss"], short)
    if broken.size:
        legend.append(("bad", "not finite"))
        caption = f"{broken.size} of {loss.size} records have a loss that is not finite (red marks)."
    alt = in_words("Training loss", step, loss, short) + alt
    return plot_of(wide, "loss", "Loss", alt, caption, legend, narrow=narrow)


def _grad_norm(history: History, clip_norm: float | None) -> Plot:
    axes, step, norm = new_axes(), history["step"], history["grad_norm"]
    positive = norm > 0
    _noisy_curve(axes, step, np.where(positive, norm, np.nan) if positive.any() else norm)
    if positive.any():
        logarithmic(axes)
    legend, caption = list(NOISY_LEGEND), ""
    if clip_norm:
        axes.axhline(clip_norm, color=STAND_IN["eval"], linewidth=1.2, dashes=(4, 3))
        clipped = float(np.mean(norm > clip_norm))
        legend.append(("eval", f"clip at {short(clip_norm)}"))
        caption = f"{percent(clipped)} of the recorded steps were clipped."
    _mark(axes, step[~np.isfinite(norm)])
    return plot_of(
        axes,
        "grad_norm",
        "Gradient norm",
        in_words("Gradient norm", step, norm, short),
        caption,
        legend,
        unit="L2, before clipping",
    )


def _minor_label(axes: Axes) -> Callable[[float, int], str]:
    """Return a formatter that labels 2 and 5 between the powers of ten, if less than two powers are
    in view."""

    def label(value: float, _: int) -> str:
        low, high = axes.get_ylim()
        narrow = high / low < 100
        return short(value, 3) if narrow and f"{value:e}"[0] in "25" else ""

    return label


def _step_time(history: History) -> Plot:
    axes = new_axes()
    known = [(name, label, colour) for name, label, colour in STEP_PARTS if history.has(name)]
    parts = np.stack([np.nan_to_num(history[name], posinf=0.0, neginf=0.0) for name, _, _ in known])
    step, means = bucket_means(history["step"], parts)
    if step.size == 1:  # an area needs a width
        step, means = np.array([step[0] - 0.5, step[0] + 0.5]), np.repeat(means, 2, axis=1)
    axes.stackplot(step, means, colors=[STAND_IN[colour] for _, _, colour in known], linewidth=0)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
    total = parts.mean(axis=1)
    whole = float(total.sum()) or 1.0
    shares = ", ".join(f"{label} {percent(part / whole)}" for (_, label, _), part in zip(known, total, strict=True))
    legend = [(colour, label) for _, label, colour in known]
    every = f"Means over {history.num_records / step.size:.0f} records. " if step.size < history.num_records else ""
    caption = f"{every}Shares: {shares}."
    return plot_of(axes, "step_time", "Where a step's time goes", f"Mean time of a step by part: {shares}.", caption, legend)


def _single(
    history: History,
    name: str,
    title: str,
    unit: str = "",
    *,
    say: Callable[[float | None], str],
    on_axis: Callable[[float], str] = tick,
    from_zero: bool = False,
    log: bool = False,
    noisy: bool = False,
) -> Plot:
    axes, step, values = new_axes(), history["step"], history[name]
    if noisy:
        _noisy_curve(axes, step, values)
    else:
        _curve(axes, step, values, "curve", 1.4)
    if log:
        axes.set_yscale("log", base=2)
    elif from_zero:
        top = float(np.nanmax(np.where(np.isfinite(values), values, np.nan)))
        axes.set_ylim(0.0, 1.1 * top if top > 0 else 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: on_axis(value)))
    alt = in_words(f"{title} [{unit}]" if unit else title, step, values, say)
    return plot_of(axes, name, title, alt, legend=NOISY_LEGEND if noisy else [], unit=unit)


# ------------------------------------------------------------------------------------------ numbers


def downsample(x: Column, y: Column, limit: int = MAX_POINTS) -> tuple[Column, Column]:
    """Return at most `limit` finite points of a curve: its ends, and the lowest and highest of each
    of equal runs of points.

    A spike of one step stays visible, which neither striding nor means can promise.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size <= limit:
        return x, y
    edges = np.linspace(0, x.size, (limit - 2) // 2 + 1).astype(int)
    kept = {0, x.size - 1}
    for first, after in pairwise(edges):
        run = y[first:after]
        kept |= {int(first + run.argmin()), int(first + run.argmax())}
    index = np.array(sorted(kept))
    return x[index], y[index]


def smoothed(y: Column) -> Column:
    """Return the centred running mean over a fiftieth of the curve (at least 5 points), without
    what is not finite.

    The window shrinks at both ends instead of reaching beyond them, so the first loss and the last
    are not bent.
    """
    half = max(2, y.size // 100)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(y.size)
    reach = np.minimum(half, np.minimum(at, y.size - 1 - at))
    low, high = at - reach, at + reach + 1
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def bucket_means(x: Column, rows: NDArray[np.float64], limit: int = STACK_POINTS) -> tuple[Column, NDArray[np.float64]]:
    """Return at most `limit` means over equal runs of points: x [points], rows [parts, points] →
    the same, shorter."""
    if x.size <= limit:
        return x, rows
    starts = np.linspace(0, x.size, limit + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(rows, starts, axis=1) / counts


def in_words(what: str, step: Column, values: Column, say: Callable[[float | None], str]) -> str:
    """Return the text alternative of a curve."""
    finite = np.flatnonzero(np.isfinite(values))
    if not finite.size:
        return f"{what}: no finite value."
    first, last = finite[0], finite[-1]
    low, high = values[finite].min(), values[finite].max()
    return (
        f"{what}: {say(values[first])} at step {step[first]:.0f}, {say(values[last])} at step {step[last]:.0f}; "
        f"lowest {say(low)}, highest {say(high)}."
    )


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def percent_tick(value: float) -> str:
    return f"{100 * value:g} %"


def _seconds(value: float, _: int) -> str:
    return f"{short(1000 * value, 3)} ms" if 0 < value < 1 else f"{short(value, 3)} s"


# ------------------------------------------------------------------------------------------ drawing


def new_axes(*, wide: bool = False, along: str = "step") -> Axes:
    """Return empty axes of a plot. `along`: the unit of the horizontal one."""
    figure = Figure(figsize=(9.6, 3.5) if wide else (4.7, 2.7), layout="constrained")
    figure.patch.set_alpha(0.0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(axis="y", color=STAND_IN["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=STAND_IN["faint"], pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(STAND_IN["grid"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 5, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(along, fontsize=9, color=STAND_IN["faint"], loc="right", labelpad=2)
    axes.margins(x=0.015, y=0.08)
    return axes


def _curve(axes: Axes, x: Column, y: Column, colour: str, width: float) -> None:
    x, y = downsample(x, y)
    marker = "o" if x.size == 1 else ""
    axes.plot(x, y, color=STAND_IN[colour], linewidth=width, solid_joinstyle="round", marker=marker, markersize=5)


def logarithmic(axes: Axes) -> None:
    """Make the axis of values logarithmic, with labels that a person reads."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(FuncFormatter(_minor_label(axes)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def _noisy_curve(axes: Axes, x: Column, y: Column) -> None:
    """Draw every record thin, and the running mean in front: on a long run the records alone are a
    solid band."""
    _curve(axes, x, y, "curve-thin", 0.8)
    _curve(axes, x, smoothed(y), "curve", 1.8)


def _mark(axes: Axes, steps: Column) -> None:
    """Draw a tick on the lower edge for each step that has no finite value to draw."""
    if not steps.size:  # the layout would make room at the origin for an empty unclipped line
        return
    if steps.size > MAX_POINTS:
        steps = steps[np.linspace(0, steps.size - 1, MAX_POINTS).astype(int)]
    edge = np.zeros_like(steps)
    axes.plot(
        steps,
        edge,
        "|",
        color=STAND_IN["bad"],
        markersize=9,
        markeredgewidth=1.6,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )


def plot_of(
    axes: Axes,
    name: str,
    title: str,
    alt: str,
    caption: str = "",
    legend: list[tuple[str, str]] | None = None,
    *,
    unit: str = "",
    narrow: Axes | None = None,
) -> Plot:
    """Return the plot with the drawing of these axes."""
    svg_narrow = None if narrow is None else _svg(narrow, f"{name}-narrow", alt)
    return Plot(name, title, unit, _svg(axes, name, alt), svg_narrow, alt, caption, tuple(legend or ()))


def _svg(axes: Axes, name: str, alt: str) -> Markup:
    """Return the drawing as an element for HTML: no prolog, no metadata, no fixed size, ids unlike
    any other plot's."""
    text = io.StringIO()
    if axes.dataLim.width <= 1:  # a single step: no fractions of a step on the axis
        middle = (axes.dataLim.x0 + axes.dataLim.x1) / 2
        axes.set_xlim(middle - 1, middle + 1)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = axes.figure
        assert isinstance(figure, Figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = text.getvalue()
    head, _, body = drawing[drawing.index("<svg") :].partition(">")
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    body = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for stand_in, variable in COLOURS.items():
        body = body.replace(stand_in, f"var(--{variable})")
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" {}>')
    # matplotlib escapes what it draws.
    return opening.format(alt, Markup(view_box[0])) + Markup(body)
