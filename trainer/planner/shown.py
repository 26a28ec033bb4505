"""The tables of plans and searches, on a console. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trainer.planner.items import GIB, Place
from trainer.planner.memory import RankMemory
from trainer.planner.search.choice import Choice
from trainer.planner.search.find import Search
from trainer.planner.search.planned import Planned
from trainer.planner.search.reasons import percent, reason
from trainer.planner.search.worlds import World

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORTH_A_LINE = 0.05  # of the memory of the line above
COLUMNS = 6  # ranks of the pipeline that are shown beside each other


def show_ranks(console: Console, ranks: Sequence[RankMemory]) -> None:
    """Show the items of each rank of the pipeline, by the memory that they are in."""
    shown = ranks if len(ranks) <= COLUMNS else [*ranks[: COLUMNS - 1], ranks[-1]]
    table = _table("GiB of a rank", *(f">stage {', '.join(map(str, rank.stages))}" for rank in shown))
    for place in Place:
        names = dict.fromkeys(item.name for rank in shown for item in rank.items if item.place is place)
        if not names:
            continue
        for name in names:
            sizes = [sum(i.num_bytes for i in rank.items if (i.name, i.place) == (name, place)) for rank in shown]
            _row(table, f"  {name}", *(f"{size / GIB:,.3f}" for size in sizes))
        peaks = (f"{rank.peak(place) / GIB:,.3f}" for rank in shown)
        _row(table, f"{place.value}, at the fullest moment", *peaks, style="bold")
    console.print(table)
    if len(shown) < len(ranks):
        console.print(
            f"and {len(ranks) - len(shown)} more ranks of the pipeline between the last two; --json has all", soft_wrap=True
        )


def show_search(console: Console, search: Search) -> None:
    """Show what a search has found: the best layouts, why the best one's neighbours lose, and what
    less memory costs in time."""
    console.print(f"{search.world_size:,} × {search.device.name}, {len(search.rough):,} layouts that may fit", soft_wrap=True)
    if search.own is None:
        console.print(f"the recipe as it is cannot run on {search.world_size:,} devices", soft_wrap=True)
    elif search.best is not None and search.own.choice != search.best.choice:
        lost = reason(search.best, search.own)
        console.print(f"the recipe as it is: {search.own.seconds:,.3f} s; {lost.text}", soft_wrap=True)
    for show in (show_ranking, show_neighbours, show_front):
        console.print()
        show(console, search)


def show_ranking(console: Console, search: Search) -> None:
    """Show the best layout of each mesh, the best first."""
    _show_layouts(console, "the best layout of each tensor × pipeline", search, search.ranked)


def show_front(console: Console, search: Search) -> None:
    """Show the layouts of which none is both faster and smaller, in steps that are worth a line."""
    shown: list[Planned] = []
    for one in search.front:
        if not shown or one.num_bytes <= (1 - WORTH_A_LINE) * shown[-1].num_bytes:
            shown.append(one)
    _show_layouts(console, "memory against time: none is both faster and smaller", search, shown)


def show_neighbours(console: Console, search: Search) -> None:
    """Show why each neighbour of the best layout loses."""
    if search.best is None:
        return
    rows = [(setting_words(search.best.choice, one.planned.choice), one) for one in search.neighbours]
    table = _table("a change of the best", ">step [s]", ">GiB", "why it loses")
    # A key is not broken where the terminal is narrow.
    longest_word = max((len(word) + 1 for words, _ in rows for word in words), default=0)
    longest_row = max((len(", ".join(words)) for words, _ in rows), default=0)
    table.columns[0].width = min(longest_row, max(longest_word, 2 * console.width // 5))
    for words, one in rows:
        why = one.reason.text.replace(" %", "\N{NO-BREAK SPACE}%")
        _row(table, ", ".join(words), f"{one.planned.seconds:,.3f}", f"{one.planned.num_bytes / GIB:,.1f}", why)
    console.print(table)


def show_worlds(console: Console, found: Iterable[World]) -> None:
    """Show what each number of devices costs."""
    table = _table(">devices", ">step [s]", ">tokens/s", ">of each", ">hours / 1B", ">GiB", "best layout")
    for one in found:
        if one.best is None:
            _row(table, f"{one.world_size:,}", "", "", "", "", "", one.why, style="dim")
            continue
        _row(
            table,
            f"{one.world_size:,}",
            f"{one.best.seconds:,.3f}",
            f"{one.best.tokens_per_s:,.0f}",
            f"{one.tokens_per_s_each:,.0f}",
            f"{one.device_hours_per_billion:,.0f}",
            f"{one.best.num_bytes / GIB:,.1f}",
            layout_words(one.best),
        )
    console.print(table)


def layout_words(planned: Planned) -> str:
    """Return a layout as words: what is not at its simplest."""
    choice, data = planned.choice, planned.prediction.layout.dp
    words = [f"tensor {choice.tensor}"]
    if choice.tensor > 1 and not choice.divides_tokens:
        words.append("tokens whole")
    if choice.pipeline > 1:
        stages = f" × {choice.virtual_stages}" if choice.virtual_stages > 1 else ""
        words.append(f"pipeline {choice.pipeline}{stages} {choice.schedule}")
    if choice.context > 1:
        words.append(f"context {choice.context}")
    words += [f"data {data}", f"micro {choice.micro_sequences}", f"ZeRO-{choice.zero_stage}"]
    places = {"optimizer": choice.offload_optimizer, "weights": choice.offload_param}
    away = [f"{what} on {place}" for what, place in places.items() if place != "none"]
    if away:
        words += [*away[:-1], f"{away[-1]} (host {planned.host_bytes / GIB:,.0f} GiB a rank)"]
    words += [f"recompute {choice.recompute}"] * (choice.recompute != "none")
    return ", ".join(words)


def setting_words(best: Choice, other: Choice) -> list[str]:
    """Return the keys in which a layout differs from the best, as the command line takes them."""
    return [f"{key}={str(value).lower()}" for key, value in other.changed_keys(best).items()]


def _show_layouts(console: Console, title: str, search: Search, layouts: Sequence[Planned]) -> None:
    table = _table(">step [s]", ">", ">tokens/s", ">GiB", title)
    for one in layouts:
        slower = percent(one.seconds / search.best.seconds - 1) if search.best and one is not search.best else ""
        unsure = "" if one.prediction.fits else " (too close to tell)"
        size = f"{one.num_bytes / GIB:,.1f}"
        _row(table, f"{one.seconds:,.3f}", slower, f"{one.tokens_per_s:,.0f}", size, layout_words(one) + unsure)
    console.print(table)


def _table(*titles: str) -> Table:
    """Return a table with these columns; numbers, whose titles begin with >, stand at the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        if title.startswith(">"):
            table.add_column(title[1:], justify="right", no_wrap=True)
        else:
            table.add_column(title, overflow="fold")
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    from rich.text import Text

    table.add_row(*(Text(cell, style=style) for cell in cells))
