"""The drawings of a schedule, and the command that makes them."""

import re
from pathlib import Path

import pytest

from parallel.schedule_table import read_csv
from parallel.schedules import build
from parallel.simulator import simulate
from trainer import cli
from trainer.commands.timeline import draw, save
from trainer.recipe import rules

EIGHT_LAYERS = str(Path(__file__).parent / "eight_layers.json")


def lines(name: str, width: int, *, ranks: int = 2, virtual_stages: int = 1, micro_batches: int = 3) -> list[str]:
    table = build(name, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=micro_batches)
    return [line.plain for line in draw(simulate(table), table, width)]


def test_steps_carry_their_names_where_there_is_room() -> None:
    assert lines("1f1b", 60) == [
        "rank 0 F0 F1 ······B0--- F2 B1--- ···B2--- ",
        "rank 1 ···F0 B0--- F1 B1--- F2 B2--- ······",
        "F forward   B backward   · bubble",
    ]


def test_a_rank_of_several_stages_names_the_stage() -> None:
    first, *_, key = lines("zbv", 200, virtual_stages=2)
    assert first.startswith("rank 0 0F0 0F1 0F2 3F0 3I0 3W0 ")
    assert key == "F forward   I gradient of the input   W gradient of the weights   · bubble"
    assert " 2F2&1B0---- " in lines("dualpipev", 400, virtual_stages=2, micro_batches=4)[1]


def test_one_letter_fills_a_step_where_names_do_not_fit() -> None:
    assert lines("1f1b", 30) == [
        "rank 0 FF··BBFBB·BB",
        "rank 1 ·FBBFBBFBB··",
        "F forward   B backward   · bubble",
    ]


def test_what_is_too_wide_is_cut_and_said() -> None:
    first, second, _, note = lines("1f1b", 13)
    assert (first, second) == ("rank 0 FF··BB", "rank 1 ·FBBFB")
    assert note == "cut after 6 of 12 units of time; --out FILE.svg draws all of it"


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_pictures_are_the_same_bytes_and_hold_the_labels(name: str, tmp_path: Path) -> None:
    table = build(name, ranks=2, virtual_stages=1 if name == "1f1b" else 2, num_micro_batches=8)
    timeline = simulate(table)
    for path in (tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"):
        save(path, table, timeline, name)
    svg = (tmp_path / "a.svg").read_bytes()
    assert svg == (tmp_path / "b.svg").read_bytes()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())
    assert {"rank 0", "rank 1", "7", "forward", "backward"} <= set(texts)
    assert any(text.startswith(f"{name}; bubble") for text in texts)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that lets pipelines through, as it will once they train."""
    monkeypatch.setattr(rules, "SINGLE_DEGREE", (), raising=False)


def schedule(*arguments: str) -> int:
    settings = ("parallel.pipeline=4", "batch.micro_sequences=1")
    return cli.main(["schedule", EIGHT_LAYERS, *(f"--set={setting}" for setting in settings), *arguments])


@pytest.mark.usefixtures("pipelines")
def test_the_command_draws_and_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "p.svg"
    assert schedule("--out", str(out)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1f1b: pipeline 4 × virtual_stages 1, 8 micro-batches"
    assert printed[1].startswith("rank 0 F0 F1 F2 F3 ···")
    in_flight = [line.split()[-1] for line in printed if re.match(r" +\d  \d", line)]
    assert in_flight == ["4", "3", "2", "1"]
    # (p - 1) / (m + p - 1)
    assert f"bubble: {3 / 11:.2%} of 33 units of time, all ranks together" in printed
    assert printed[-1] == str(out)
    assert out.is_file()


@pytest.mark.usefixtures("pipelines")
@pytest.mark.parametrize("command", ["schedule", "check"])
def test_stages_are_shown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set=parallel.pipeline=2", "--set=batch.micro_sequences=1", "--set=parallel.balance=[5,3]"]
    assert cli.main([command, EIGHT_LAYERS, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("stage 0"))
    first, second, imbalance = lines[begin : begin + 3]
    assert first == "stage 0 (rank 0): embedding, layers 0–4 · 7.56 M parameters · 57.7 % of the work"
    assert second == "stage 1 (rank 1): layers 5–7, head · 5.01 M parameters · 42.3 % of the work"
    assert imbalance == "imbalance: the busiest rank has 15.5 % more than the mean"


@pytest.mark.usefixtures("pipelines")
def test_ranks_of_several_stages_are_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--set", "parallel.schedule=zbv", "--set", "parallel.virtual_stages=2") == 0
    stages = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    assert len(stages) == 12
    assert stages[0].startswith("stage 0 (rank 0): embedding, layer 0 · ")
    assert stages[7].startswith("stage 7 (rank 0): layer 7, head · ")
    assert stages[8].startswith("rank 0: stages 0, 7 · ")
    shares = [float(line.split("·")[2].split()[0]) for line in stages]
    assert sum(shares[:8]) == pytest.approx(100, abs=0.5)  # eight figures of one decimal place
    assert sum(shares[8:]) == pytest.approx(100, abs=0.5)


@pytest.mark.usefixtures("pipelines")
def test_stages_of_a_network_that_is_not_known_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--set", 'model={"from_pretrained":"owner/name"}') == 0
    printed = capsys.readouterr().out
    assert 'stages: known once model.from_pretrained "owner/name" is opened' in printed


@pytest.mark.usefixtures("pipelines")
def test_the_command_takes_costs_latency_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--set", "parallel.schedule=gpipe", "--gpus", "8", "--costs", "2,2,2", "--latency", "0.5") == 0
    printed = capsys.readouterr().out
    assert "4 micro-batches" in printed
    # (m + p - 1)(F + B), and the latency of one way there and back.
    assert f"of {7 * 6 + 6 * 0.5:g} units" in printed


@pytest.mark.usefixtures("pipelines")
def test_a_table_that_was_written_is_drawn_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert schedule("--out", str(table)) == 0
    first = capsys.readouterr().out.splitlines()
    assert read_csv(table.read_text()).num_micro_batches == 8
    assert schedule("--set", f"parallel.schedule={table}") == 0
    assert capsys.readouterr().out.splitlines()[1:] == first[1:-1]


DUALPIPEV = ["--set", "parallel.schedule=dualpipev", "--set", "parallel.virtual_stages=2"]


@pytest.mark.usefixtures("pipelines")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "parallel.pipeline=1"], "parallel.pipeline = 1: there is no pipeline to draw; legal: 2 or more"),
        (["--gpus", "6"], "world size 6 (--gpus) is not a multiple of"),
        (["--gpus", "16", *DUALPIPEV], "= 2; nearest legal: 8 micro-batches (batch.global_sequences 32)"),
        (["--out", "x.gif"], "--out x.gif: legal endings: .svg, .png, .csv"),
        (["--out", "none/x.svg"], "--out none/x.svg: No such file or directory"),
        (["--costs", "1,2"], "'1,2' is not three durations above 0, as in 1,1,1"),
        (["--costs", "1,0,1"], "'1,0,1' is not three durations above 0"),
        (["--latency", "-1"], "'-1' is not a number of at least 0"),
        (["--set", "batch.global_sequences=1000000"], "4 stages × 1000000 micro-batches are too many to draw"),
    ],
)
def test_wrong_words_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule(*arguments) == 78
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert said in line


@pytest.mark.usefixtures("pipelines")
def test_check_knows_the_schedule_s_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ["--set=parallel.pipeline=2", '--set=parallel.schedule="dualpipev"', "--set=parallel.virtual_stages=2"]
    settings = [*pipeline, "--set=batch.micro_sequences=1"]
    assert cli.main(["check", EIGHT_LAYERS, *settings, "--world-size", "4"]) == 0
    assert cli.main(["check", EIGHT_LAYERS, *settings, "--world-size", "8"]) == 78
    assert "needs at least 2 · 2 micro-batches" in capsys.readouterr().err
