"""The display of a pipeline: its schedule as a line per rank in the terminal or a picture in a
file, its figures, its stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parallel.balance import loads_of_ranks
from parallel.schedule_table import Action, Overlap, ScheduleTable, Step, actions_of, write_csv
from parallel.simulator import Span, Timeline, peak_in_flight
from trainer.costs.blocks import count_parameters
from trainer.errors import RecipeError
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.recipe.pipeline import rank_of_stage
from trainer.recipe.stages import cost_of_blocks, stages_of
from trainer.schema import Recipe
from trainer.track.text import percent, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CELLS = 50_000  # stages × micro-batches: takes about 3 s on one core, and nobody looks at more
IDLE = "·"

# In the order of the legend. Light enough for black text, and of different lightness for readers
# without colour vision.
COLOURS = {"F": "#8ecae6", "B": "#95d5b2", "I": "#d3f3c8", "W": "#ffd166", "&": "#cdb4db"}
WORDS = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
    "&": "forward and backward as one step",
}


def check_size(num_stages: int, num_micro_batches: int) -> None:
    """Raise RecipeError if the schedule is too long to draw."""
    if num_stages * num_micro_batches > MAX_CELLS:
        raise RecipeError(
            f"{num_stages} stages × {num_micro_batches} micro-batches are too many to draw; legal: at most {MAX_CELLS:,}; a "
            "larger --gpus gives each data-parallel replica fewer micro-batches"
        )


def save(path: Path, table: ScheduleTable, timeline: Timeline, title: str) -> None:
    """Write the picture, or the table as CSV, depending on the file's ending."""
    try:
        match path.suffix.lower():
            case ".csv":
                write_csv(table, path)
            case ".svg" | ".png":
                _picture(timeline, table, title, path)
            case _:
                raise RecipeError(f"--out {path}: legal endings: .svg, .png, .csv")
    except OSError as error:
        raise RecipeError(f"--out {path}: {error.strerror}") from None


def summary(timeline: Timeline, table: ScheduleTable) -> RenderableType:
    """Return the bubble share and the micro-batches in flight, for each rank and for all
    together."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("rank", "stages", "bubble", "in flight"):
        rows.add_column(heading, justify="left" if heading == "stages" else "right")
    for rank, steps in enumerate(table.steps):
        stages = table.stages(rank)
        in_flight = peak_in_flight(steps) / len(stages)
        share = timeline.bubble_share(rank)
        rows.add_row(str(rank), ", ".join(map(str, stages)), f"{share:.1%}", f"{in_flight:g}")
    return Group(
        rows,
        f"bubble: {timeline.bubble_share():.2%} of {timeline.makespan:g} units of time, all ranks together",
        "in flight: the most micro-batches whose activations a rank holds at once",
    )


def division(recipe: Recipe, network: TransformerConfig) -> Iterator[str]:
    """Yield what each stage holds and has to do, the same for each rank if it has several stages,
    and the busiest rank's excess over the mean."""
    stages, ranks = stages_of(recipe, network), rank_of_stage(recipe.parallel)
    cost = dict(zip(blocks_of(network), cost_of_blocks(recipe, network), strict=True))
    costs = [sum(cost[block] for block in blocks) for blocks in stages]
    parameters = [count_parameters(network, blocks) for blocks in stages]
    loads, sizes = loads_of_ranks(costs, ranks), loads_of_ranks(parameters, ranks)

    def figures(size: int, load: int) -> str:
        return f"{scaled(size)} parameters · {percent(load / sum(costs))} of the work"

    for stage, blocks in enumerate(stages):
        yield f"stage {stage} (rank {ranks[stage]}): {_names(blocks)} · {figures(parameters[stage], costs[stage])}"
    if len(loads) == len(stages):
        yield f"imbalance: the busiest rank has {percent(_above_mean(loads))} more than the mean"
        return
    for rank in range(len(loads)):
        held = ", ".join(str(stage) for stage, holder in enumerate(ranks) if holder == rank)
        yield f"rank {rank}: stages {held} · {figures(sizes[rank], loads[rank])}"
    yield (
        f"imbalance: the busiest rank has {percent(_above_mean(loads))} more than the mean, the largest stage "
        f"{percent(_above_mean(costs))}"
    )


def _names(blocks: Sequence[Block]) -> str:
    """Return the names of blocks, such as "embedding, layers 0–4"."""
    layers = [block.layer for block in blocks if block.kind == "layer"]
    span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
    return ", ".join(dict.fromkeys(span if block.kind == "layer" else block.kind for block in blocks))


def _above_mean(costs: Sequence[int]) -> float:
    return max(costs) * len(costs) / sum(costs) - 1


# ----------------------------------------------------------------------------------------- terminal


def draw(timeline: Timeline, table: ScheduleTable, width: int) -> list[Text]:
    """Return a line per rank and the key, in at most `width` columns.

    Each step shows its name if all names fit; else one letter fills it, at the scale of the
    shortest step. What is still too wide is cut, and the last line says so.
    """
    heads = [f"rank {rank} ".ljust(len(f"rank {table.num_ranks} ")) for rank in range(table.num_ranks)]
    room = max(width - len(heads[0]), 1)
    labels = {span: _label(span.step, table) for spans in timeline.spans for span in spans}
    named = max((len(label) + 1) / (span.end - span.start) for span, label in labels.items())
    lettered = 1 / min(span.end - span.start for span in labels)
    is_named = ceil(timeline.makespan * named) <= room
    scale = named if is_named else lettered
    lines = []
    for head, spans in zip(heads, timeline.spans, strict=True):
        cells = _cells(spans, labels, scale, is_named=is_named)
        cells.append(IDLE * (_column(timeline.makespan, scale) - len(cells)), style="dim")
        cells.truncate(room)
        lines.append(Text(head) + cells)
    lines.append(_key(labels))
    if ceil(timeline.makespan * scale) > room:
        shown = f"{room / scale:.3g} of {timeline.makespan:.6g} units of time"
        lines.append(Text(f"cut after {shown}; --out FILE.svg draws all of it"))
    return lines


def _cells(spans: Iterable[Span], labels: dict[Span, str], scale: float, *, is_named: bool) -> Text:
    """Return the line of one rank. A blank separates names, so that neighbours differ without
    colour; letters fill their cell."""
    line = Text()
    for span in spans:
        start, end = _column(span.start, scale), _column(span.end, scale)
        line.append(IDLE * (start - len(line)), style="dim")
        letter = _letter(span.step)
        style = f"black on {COLOURS[letter]}"
        if is_named:
            line.append(labels[span].ljust(end - start - 1, "-"), style=style)
            line.append(" ")
        else:
            line.append(letter * (end - start), style=style)
    return line


def _column(time: float, scale: float) -> int:
    """Return the column of a time. Half a column rounds up, not to the even one, so that equal
    steps stay equally wide."""
    return floor(time * scale + 0.5)


def _key(labels: dict[Span, str]) -> Text:
    line = Text()
    for letter in _letters(span.step for span in labels):
        line.append(letter, style=f"black on {COLOURS[letter]}")
        line.append(f" {WORDS[letter]}   ")
    line.append(f"{IDLE} bubble", style="dim")
    return line


def _letters(steps: Iterable[Step]) -> list[str]:
    """Return the letters of the key, in its order."""
    found = {_letter(step) for step in steps}
    return [letter for letter in COLOURS if letter in found]


def _letter(step: Step) -> str:
    return "&" if isinstance(step, Overlap) else str(step.kind)


def _label(step: Step, table: ScheduleTable) -> str:
    """Return a step's name: as in the CSV (4F0) if a rank has several stages; else without the
    stage, which the rank tells (F0)."""
    one_each = table.num_stages == table.num_ranks
    names = [f"{action.kind}{action.micro_batch}" if one_each else str(action) for action in actions_of(step)]
    return "&".join(names)


# ------------------------------------------------------------------------------------------ picture

INCHES_PER_LABEL = 0.3  # a micro-batch's number of two digits in 7 points
MAX_INCHES = 60.0
LIGHTEST = 0.55  # the share by which a rank's last stage fades to white


def _picture(timeline: Timeline, table: ScheduleTable, title: str, path: Path) -> None:
    """Draw micro-batch numbers in boxes, paler for a rank's later stages. The same table gives the
    same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spans = [span for on_rank in timeline.spans for span in on_rank]
    shortest = min(span.end - span.start for span in spans)
    inches = min(max(timeline.makespan / shortest * INCHES_PER_LABEL, 6.0), MAX_INCHES)
    figure = Figure(figsize=(inches, 1.4 + 0.35 * table.num_ranks), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    has_room = inches / timeline.makespan * shortest >= 0.6 * INCHES_PER_LABEL
    for rank, on_rank in enumerate(timeline.spans):
        _draw_rank(axes, rank, on_rank, table.stages(rank), with_names=has_room)
    axes.set_yticks(range(table.num_ranks), [f"rank {rank}" for rank in range(table.num_ranks)])
    axes.set_ylim(table.num_ranks - 0.4, -0.6)
    axes.set_xlim(0, timeline.makespan)
    axes.tick_params(length=0, labelsize=8)
    paler = "" if table.num_stages == table.num_ranks else "; paler: a later stage of the rank"
    axes.set_xlabel(f"time, in the unit of the costs{paler}", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{title}; bubble {timeline.bubble_share():.1%}", fontsize=9, loc="left")
    legend = [Patch(facecolor=COLOURS[letter], label=WORDS[letter]) for letter in _letters(span.step for span in spans)]
    figure.legend(handles=legend, loc="outside lower left", ncols=len(legend), fontsize=8, frameon=False)
    with mpl.rc_context({"svg.hashsalt": "schedule", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_rank(axes: Axes, rank: int, spans: Iterable[Span], stages: list[int], *, with_names: bool) -> None:
    boxes = defaultdict(list)  # by colour, because a call for each box would take minutes
    pairs = []
    for span in spans:
        parts = actions_of(span.step)
        width = (span.end - span.start) / len(parts)
        for order, action in enumerate(parts):
            start = span.start + order * width
            boxes[_faded(COLOURS[_letter(span.step)], stages.index(action.stage), len(stages))].append((start, width))
            if with_names:
                axes.text(start + width / 2, rank, _picture_label(action, span.step), ha="center", va="center", fontsize=7)
        if len(parts) > 1:
            pairs.append((span.start, span.end - span.start))
    for colour, extents in boxes.items():
        axes.broken_barh(extents, (rank - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.8)
    axes.broken_barh(pairs, (rank - 0.4, 0.8), facecolor="none", edgecolor="#5a4a66")


def _picture_label(action: Action, step: Step) -> str:
    """Return the label of an action. Two actions in one box share a colour, so they need their
    letters."""
    return f"{action.kind}{action.micro_batch}" if isinstance(step, Overlap) else str(action.micro_batch)


def _faded(colour: str, place: int, of: int) -> tuple[float, float, float]:
    fade = LIGHTEST * place / max(of - 1, 1)
    red, green, blue = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return (red + (1 - red) * fade, green + (1 - green) * fade, blue + (1 - blue) * fade)
