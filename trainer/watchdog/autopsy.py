"""The search for the rank that brought a run to a stop, from what its ranks report, and the page
about it. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.watchdog.beats import DONE, IN_A_STEP, Beat
from trainer.watchdog.flight_recorder import Collective
from trainer.watchdog.stacks import STATES, innermost_of_ours, is_waiting

STACK_LINES = 8
RANKS_SHOWN = 16  # fits one page; ranks at the same place share a row


@dataclass(frozen=True)
class Report:
    """The answer of one rank when it is asked.

    It has its last beat, its stack, its collectives, and what its host knows of silent `neighbours`
    (rank → letter of the state, "" when gone).
    """

    beat: Beat
    stack: tuple[str, ...]
    collectives: tuple[Collective, ...]
    neighbours: Mapping[int, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "beat": self.beat.encode(),
            "stack": list(self.stack),
            "collectives": [collective.as_json() for collective in self.collectives],
            "neighbours": {str(rank): state for rank, state in self.neighbours.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        return cls(
            Beat.decode(value["beat"]),
            tuple(value["stack"]),
            tuple(Collective.from_json(entry) for entry in value["collectives"]),
            {int(rank): state for rank, state in value["neighbours"].items()},
        )

    @property
    def pending(self) -> list[Collective]:
        return [collective for collective in self.collectives if not collective.over]

    @property
    def waits(self) -> bool:
        return bool(self.pending) or is_waiting(self.stack)

    @property
    def place(self) -> str:
        return innermost_of_ours(self.stack)

    def last(self, group: str) -> int:
        """Return the number of the last collective that the rank came to; 0 for none."""
        return max((collective.number for collective in self.collectives if collective.group == group), default=0)


@dataclass(frozen=True)
class Scene:
    """The state of a stopped run, as far as it is known.

    `silent`: the last beats of ranks that do not answer. `written`: the stacks they left on disk
    (`LastResort`).
    """

    reports: Mapping[int, Report]
    silent: Mapping[int, Beat]
    written: Mapping[int, Sequence[str]]
    idle_s: Mapping[int, float]

    def state(self, rank: int) -> str | None:
        """Return the system's letter for the state of a rank's process; None if nobody on its host
        could look."""
        return next((report.neighbours[rank] for report in self.reports.values() if rank in report.neighbours), None)


@dataclass(frozen=True)
class Finding:
    ranks: tuple[int, ...]
    what: str


def find(scene: Scene) -> Finding:
    """Return the first ranks that are missing or different, and in what way."""
    if failed := {rank: beat for rank, beat in scene.silent.items() if beat.ended not in ("", DONE)}:
        last_beat = failed[min(failed)]
        return Finding(tuple(sorted(failed)), f"has ended: {last_beat.ended}, in {last_beat.at}")
    stuck = {rank for rank in scene.silent if scene.state(rank) not in (None, "")}
    # gloo ends a peer that receives something unexpected, so a silent rank is not always the cause.
    if not stuck and (found := _left_the_usual_order(scene.reports)):
        return found
    if scene.silent:
        return _silent(scene)
    waiting = {rank: report for rank, report in scene.reports.items() if report.waits}
    busy = sorted(set(scene.reports) - set(waiting))
    if busy and waiting:
        first = scene.reports[busy[0]]
        return Finding(tuple(busy), f"{_have(busy, 'has', 'have')} not come to it: at {first.place}, in {first.beat.at}")
    if busy:
        first = scene.reports[busy[0]]
        return Finding(tuple(busy), f"{_have(busy, 'does', 'do')} not get on: at {first.place}, in {first.beat.at}")
    for rule in (_differs_at_one_number, _came_to_fewer):
        if found := rule(waiting):
            return found
    return Finding(
        (), "each rank waits for others, and none is missing: a message was lost, or two of them wait for each other"
    )


def _have(ranks: Sequence[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def _how(scene: Scene, rank: int) -> str:
    state = scene.state(rank)
    return "does not answer" if state is None else STATES.get(state, f"does not answer (state {state})")


def _silent(scene: Scene) -> Finding:
    ranks = sorted(scene.silent)
    first = scene.silent[ranks[0]]
    how = first.ended or _how(scene, ranks[0])
    stack = scene.written.get(ranks[0]) or []
    place = innermost_of_ours(stack) if stack else f"last seen at {first.doing}"
    return Finding(tuple(ranks), f"{how}: {place}, in {first.at}")


def _left_the_usual_order(reports: Mapping[int, Report]) -> Finding | None:
    """Find a rank whose last collective differs from the one at that point in earlier steps."""
    # Outside a step there is no usual order.
    in_steps = [rank for rank, report in reports.items() if report.beat.phase in IN_A_STEP]
    odd = {rank: strange for rank in in_steps for strange in reports[rank].collectives[-1:] if strange.usual}
    if not odd or len(odd) == len(reports) > 1:
        return None
    first = min(odd)
    where = f"is in {odd[first]}, at {reports[first].place}, where {odd[first].usual} came before"
    return Finding(tuple(sorted(odd)), f"{where}: a collective was left out, or is one too many")


def _differs_at_one_number(waiting: Mapping[int, Report]) -> Finding | None:
    """Find two different collectives under one number of one group."""
    by_number: dict[tuple[str, int], dict[int, Collective]] = defaultdict(dict)
    for rank, report in waiting.items():
        for collective in report.pending:
            by_number[collective.group, collective.number][rank] = collective
    for others in by_number.values():
        kinds = Counter(collective.what for collective in others.values()).most_common()
        if len(kinds) > 1:
            ranks = tuple(rank for rank in sorted(others) if others[rank].what != kinds[0][0])
            usual = next(rank for rank in sorted(others) if others[rank].what == kinds[0][0])
            return Finding(ranks, f"is in {others[ranks[0]]}, while rank {usual} is in {others[usual].what}")
    return None


def _came_to_fewer(waiting: Mapping[int, Report]) -> Finding | None:
    """Find a rank that has not come to a collective in which another one waits, because it waits in
    another group's."""
    for rank in sorted(waiting):
        for collective in waiting[rank].pending:
            members = [other for other in collective.ranks if other in waiting]
            if behind := tuple(other for other in members if waiting[other].last(collective.group) < collective.number):
                first = waiting[behind[0]]
                where = str(first.pending[-1]) if first.pending else first.place
                return Finding(behind, f"{_have(behind, 'has', 'have')} not come to {collective}: in {where}")
    return None


# ----------------------------------------------------------------------------------------- the page


def page(title: str, verdict: str, scene: Scene, finding: Finding) -> str:
    """Return the page as plain text of 60 to 100 lines, for the terminal and a file."""
    return "\n".join([title, "", verdict, "", *_table(scene), "", *_collectives(scene, finding), *_stacks(scene, finding)])


def _rows(scene: Scene) -> Iterator[tuple[int, str, str, str, float, str]]:
    """Yield (rank, host, process, phase, idle, doing)."""
    for rank in sorted({*scene.reports, *scene.silent}):
        report = scene.reports.get(rank)
        beat = report.beat if report else scene.silent[rank]
        if report:
            doing = f"{report.place}; waits in {report.pending[-1]}" if report.pending else report.place
        else:
            stack = scene.written.get(rank)
            said = beat.ended or _how(scene, rank)
            doing = f"{said}; {innermost_of_ours(stack)}" if stack else f"{said}; last seen at {beat.doing}"
        yield rank, beat.host, str(beat.pid), beat.at, scene.idle_s.get(rank, beat.idle_s), doing


def _table(scene: Scene) -> Iterator[str]:
    """Yield the table of ranks. Those at one place share a row, so that a thousand of them still
    fit on the page."""
    shared: dict[tuple[str, str], list[tuple[int, str, str, str, float, str]]] = defaultdict(list)
    for row in _rows(scene):
        shared[row[3], row[5]].append(row)
    yield "rank            host:process              idle      in                        doing"
    for rows in list(shared.values())[:RANKS_SHOWN]:
        ranks = _span([row[0] for row in rows])
        _, host, process, phase, _, doing = rows[0]
        where = f"{host}:{process}" + (f" +{len(rows) - 1}" if len(rows) > 1 else "")
        yield f"{ranks:<15} {where:<25} {max(row[4] for row in rows):7.1f} s {phase:<25} {doing}"
    if len(shared) > RANKS_SHOWN:
        yield f"… and {len(shared) - RANKS_SHOWN} more places"


def _span(ranks: Sequence[int]) -> str:
    """Return ranks in the form "0–3, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _collectives(scene: Scene, finding: Finding) -> Iterator[str]:
    """Yield, for the groups in which somebody waits, how far each member came."""
    groups = {c.group: c for report in scene.reports.values() for c in report.pending}
    for group, example in list(groups.items())[:6]:
        members = [rank for rank in (example.ranks or sorted(scene.reports)) if rank in scene.reports]
        yield f"collectives of {example.axes} (ranks {_span(example.ranks)})"
        for rank in members[:RANKS_SHOWN]:
            mine = [c for c in scene.reports[rank].collectives if c.group == group]
            for collective in mine[-2:]:
                mark = " ←" if rank in finding.ranks and collective is mine[-1] else ""
                word = "over" if collective.over else "waits"
                yield f"  rank {rank}: {collective.number} {collective.what}, {word}, begun {collective.age_s:.1f} s ago{mark}"
        yield ""


def _stacks(scene: Scene, finding: Finding) -> Iterator[str]:
    """Yield the stack of the culprit, then that of one rank for each other place."""
    shown: set[str] = set()
    stacks: dict[int, Sequence[str]] = {rank: report.stack for rank, report in scene.reports.items()}
    stacks |= {rank: stack for rank, stack in scene.written.items() if stack}
    first: Callable[[int], tuple[bool, int]] = lambda rank: (rank not in finding.ranks, rank)  # noqa: E731
    for rank in sorted(stacks, key=first):
        lines = list(stacks[rank])[:STACK_LINES]
        if not lines or lines[0] in shown or len(shown) >= 6:
            continue
        shown.add(lines[0])
        yield f"stack of rank {rank}, the innermost first"
        yield from (f"  {line}" for line in lines)
        yield ""
