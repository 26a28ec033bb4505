"""The planner beside published measurements: a change of the model that loses accuracy is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.simulator import simulate
from tools import validate_planner
from tools.published import comparison, regret
from tools.published.comparison import FOLDER, Accuracy, Compared, Table, ranks, sweeps
from tools.published.pipeline import zb_h2
from tools.validate_planner import BEGIN, BUBBLES, END, GUIDE, MEMORY, TIME, accuracy, guide_with, regret_of, tables

# Mean and largest error that a table of times may have: the goals of the planner where it reaches
# them, else what it reached.
GOALS = {
    "SC'21, table 1": (0.05, 0.12),
    "Korthikanti, tables 3 and 5": (0.05, 0.12),
    "Korthikanti, table 4": (0.05, 0.13),
    "vTrain, one node": (0.12, 0.40),
    "BigScience, A100": (0.10, 0.30),
    "nanotron, H100": (0.31, 0.80),
    "Zero bubble, table 5": (0.12, 0.28),
    "Zero bubble, table 4": (0.06, 0.12),
    "MosaicML, FSDP": (0.05, 0.32),
    "DeepSpeed, offload": (0.38, 0.60),
}
BEATS_NO_NULL_MODEL = {"Zero bubble, table 5"}


def row(ours: float, published: float, *, work: float = 0.0, sweep: str = "") -> Compared:
    return Compared(what="", published=published, ours=ours, work=work, sweep=sweep)


def test_every_table_has_a_goal() -> None:
    assert GOALS.keys() == {table.title for table in TIME}


@pytest.mark.parametrize("table", TIME, ids=lambda table: table.title)
def test_the_errors_are_within_the_goals(table: Table) -> None:
    found, (mean, largest) = accuracy(table, FOLDER), GOALS[table.title]
    assert found is not None
    assert found.mean <= mean
    assert found.largest <= largest
    if found.null is not None:
        assert (found.mean < found.null) == (table.title not in BEATS_NO_NULL_MODEL)


def test_memory_beats_a_constant_number_of_bytes_for_a_parameter() -> None:
    found = [accuracy(table, FOLDER) for table in MEMORY]
    assert all(one is not None and one.mean <= 0.08 and (one.null is None or one.mean < one.null) for one in found)


def test_bubble_rates_are_those_that_were_printed() -> None:
    """With four digits, from durations of as many."""
    found = accuracy(BUBBLES[0], FOLDER)
    assert found is not None
    assert found.rows == 36
    assert found.largest <= 1e-4


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zb_h2_has_no_bubble_between_equal_actions(ranks: int) -> None:
    """Each rank works without a pause from its first step to its last (the paper, section 2.2)."""
    for spans in simulate(zb_h2(ranks, 4 * ranks)).spans:
        assert spans[-1].end - spans[0].start == 3 * 4 * ranks


def test_the_planners_pick_is_near_the_best_measured_layout() -> None:
    """2 % is the goal, over all sweeps and of each table."""
    found = {table.title: regret_of(table, FOLDER) for table in TIME}
    sweeping = {title: one for title, one in found.items() if one is not None}
    assert {"vTrain, one node", "BigScience, A100", "nanotron, H100"} <= sweeping.keys()
    assert all(one.pick <= 0.02 < one.random for one in sweeping.values())


def test_the_guide_has_the_tables() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert guide_with(text, tables(FOLDER)) == text, "write them anew: python -m tools.validate_planner"


def test_check_names_the_lines_that_have_drifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = tmp_path / "README.md"
    guide.write_text(f"above\n{BEGIN}\n\nan old line\n\n{END}\nbelow\n")
    monkeypatch.setattr(validate_planner, "GUIDE", guide)
    monkeypatch.setattr(validate_planner, "tables", lambda folder: ["a new line"])
    monkeypatch.setattr("sys.argv", ["validate_planner", "--check"])
    assert validate_planner.main() == 1
    assert capsys.readouterr().out == "a new line\nan old line\n"
    monkeypatch.setattr("sys.argv", ["validate_planner"])
    assert validate_planner.main() == 0
    assert guide.read_text() == f"above\n{BEGIN}\n\na new line\n\n{END}\nbelow\n"
    monkeypatch.setattr("sys.argv", ["validate_planner", "--check"])
    assert validate_planner.main() == 0


def test_a_folder_without_a_file_has_no_row_of_its_table(tmp_path: Path) -> None:
    name = "zero_bubble_schedules_half.csv"
    (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    written = "\n".join(tables(tmp_path))
    assert "Zero bubble, table 5" in written
    assert "BigScience" not in written


def test_the_scalar_comes_from_one_row_which_is_left_out(tmp_path: Path) -> None:
    """Also when the rows of another folder do not have it."""

    def rows(folder: Path) -> list[Compared]:
        there = [Compared(what=what, published=2.0, ours=1.0) for what in ("reference", "a", "b")]
        return there if folder == FOLDER else [Compared(what="c", published=4.0, ours=1.0)]

    table = Table(title="", what="", rows=rows, reference=comparison.Reference(rows, "reference"))
    assert [(one.what, one.ours) for one in table.compared(FOLDER)] == [("a", 2.0), ("b", 2.0)]
    assert [(one.what, one.ours) for one in table.compared(tmp_path)] == [("c", 2.0)]


def test_errors_of_a_table() -> None:
    found = Accuracy.of([row(11.0, 10.0), row(8.0, 10.0)])
    assert (found.mean, found.largest, found.signed) == pytest.approx((0.15, 0.2, -0.05))
    found = Accuracy.of([row(0.25, 0.5), row(0.75, 0.5)], absolute=True)
    assert (found.mean, found.largest, found.signed) == pytest.approx((0.25, 0.25, 0.0))


def test_the_null_model_takes_each_row_at_the_rate_of_the_others() -> None:
    assert comparison.null_error([row(1, 1.0, work=1.0), row(1, 1.0, work=2.0)]) == pytest.approx((0.5 + 1.0) / 2)
    assert comparison.null_error([row(1, 2.0, work=2.0), row(1, 3.0, work=3.0)]) == 0.0
    assert comparison.null_error([row(1, 1.0), row(1, 1.0)]) is None


def test_ranks_are_compared_within_a_sweep() -> None:
    """Two sweeps in right order each, whose rows together are not."""
    first = [row(ours, ours, sweep="a") for ours in (1.0, 2.0, 3.0, 4.0)]
    second = [row(ours, 10 * ours, sweep="b") for ours in (1.0, 2.0, 3.0, 4.0)]
    assert comparison.within_sweeps([*first, *second]) == pytest.approx(1.0)
    assert comparison.within_sweeps([row(-one.ours, one.published, sweep="c") for one in first]) == pytest.approx(-1.0)
    assert comparison.within_sweeps(first[:3]) is None
    assert ranks([3.0, 1.0, 3.0]) == [1.5, 0.0, 1.5]
    assert sweeps([row(1.0, 1.0)], least=1) == {}


def test_regret_is_the_slowdown_of_the_pick() -> None:
    """The best takes 2 s, the pick 3 s: its two measurements are averaged."""
    members = [row(1.0, 2.0, sweep="a"), row(1.0, 4.0, sweep="a"), row(2.0, 2.0, sweep="a"), row(3.0, 7.0, sweep="a")]
    found = regret.regret(members)
    assert found is not None
    assert (found.sweeps, found.layouts, found.pick, found.worst, found.random) == pytest.approx((1, 3, 0.5, 0.5, 1.0))
    assert regret.regret(members[:2]) is None
