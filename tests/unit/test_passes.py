"""Passes over the data: how many steps they are, what each row is seen, and where they are said."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import schema
from trainer.cli import main
from trainer.data import PreparedData, prepare
from trainer.data.loader import TrainData
from trainer.errors import RecipeError
from trainer.learning_rate import changed_length, lr_at
from trainer.passes import Drawn, Passes, kept, stamp_of
from trainer.recipe import load
from trainer.recipe.epochs import settled
from trainer.schema import Recipe
from trainer.tasks import TASKS

SEQ_LEN, GLOBAL = 16, 4
ROWS = {"large": 36, "small": 12}
MODEL = {"family": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": SEQ_LEN}}


def one_source(sequences: int) -> Passes:
    return Passes((Drawn("a", sequences, 1.0),))


@pytest.mark.parametrize(
    ("epochs", "sequences", "global_sequences", "steps"),
    [
        (1.0, 6020, 8, 753),
        (0.5, 6020, 8, 377),
        (2.7, 6020, 8, 2032),
        (3, 1000, 10, 300),
        (0.1, 30, 3, 1),  # 0.1 * 30 / 3 is above 1 in floats
        (1e-6, 5, 8, 1),
    ],
)
def test_steps_are_the_epochs_rounded_up(epochs: float, sequences: int, global_sequences: int, steps: int) -> None:
    assert one_source(sequences).steps(epochs, global_sequences) == steps


@given(st.decimals(min_value="0.001", max_value=1000, places=3), st.integers(1, 10**9), st.integers(1, 4096))
def test_no_step_is_missing_and_none_too_many(epochs: Any, sequences: int, global_sequences: int) -> None:
    steps = one_source(sequences).steps(float(epochs), global_sequences)
    wanted = Fraction(epochs) * sequences
    assert (steps - 1) * global_sequences < wanted <= steps * global_sequences


def data_of(*weights: float) -> dict[str, Any]:
    """Two sources, by the names that they have in the working folder."""
    sources: list[dict[str, Any]] = [{"path": f"{name}.jsonl"} for name in ROWS]
    for source, weight in zip(sources, weights, strict=False):
        source["weight"] = weight
    return {"sources": sources, "seq_len": SEQ_LEN, "eval_fraction": 0.0, "workers": 1, "cache_dir": "cache"}


def prepared(data: dict[str, Any]) -> PreparedData:
    return prepare(schema.Data.model_validate(data), seed=5, cache_dir=Path("cache"), build=True, progress=lambda *_: None)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources and a cache in which they are tokenized; documents are a sequence each, and all differ."""
    folder = tmp_path_factory.mktemp("tokenized")
    for name, rows in ROWS.items():
        # with the end of the document it is a sequence
        texts = [f"{name} {n:09d}"[: SEQ_LEN - 1] for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepared(data_of())
    for note in (folder / "cache").glob("*.passes.json"):
        note.unlink()
    return folder


@pytest.fixture
def folder(tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, with a recipe."""
    shutil.copytree(tokenized, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write(data=data_of(), train={"epochs": 2.7})
    return tmp_path


def write(**sections: Any) -> None:
    before = json.loads(Path("r.json").read_text()) if Path("r.json").exists() else {}
    recipe = {"model": MODEL, "batch": {"global_sequences": GLOBAL}, **before, **sections}
    Path("r.json").write_text(json.dumps(recipe))


def seen(found: PreparedData, steps: int, dp: int) -> list[tuple[int, ...]]:
    """The rows of these steps in the order of the run, whichever rank reads them."""
    data = TrainData(
        found.train,
        found.weights,
        row_tokens=SEQ_LEN,
        seed=5,
        isolate_documents=True,
        global_sequences=GLOBAL,
    )
    return [
        tuple(row.tolist())
        for step in range(steps)
        for rank in range(dp)
        for batch in data.micro_batches(step, dp_rank=rank, dp=dp, micro_sequences=1)
        for row in batch.tokens_BS
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.0, 2.7])
def test_every_row_is_seen_as_often_as_there_are_epochs(epochs: float) -> None:
    found = prepared(data_of())
    assert found.passes.sequences == 48
    steps = found.passes.steps(epochs, GLOBAL)
    rows = seen(found, steps, dp=1)
    assert rows == seen(found, steps, dp=2)
    whole, started = divmod(Fraction(str(epochs)), 1)
    times = Counter(rows)
    # as many as the epochs ask, and those that fill the last step
    assert len(rows) == -(-48 * Fraction(str(epochs)) // GLOBAL) * GLOBAL
    assert len(times) == (48 if whole else len(rows))
    assert set(times.values()) == {int(whole), *([int(whole) + 1] if started else [])} - {0}


@pytest.mark.usefixtures("folder")
def test_with_weights_a_source_has_its_share_of_a_pass() -> None:
    found = prepared(data_of(1.0, 1.0))
    steps = found.passes.steps(1.0, GLOBAL)
    assert steps * GLOBAL == 48
    of_small = sum(row[:5] == tuple(b"small") for row in seen(found, steps, dp=1))
    assert [source.share for source in found.passes.sources] == [0.5, 0.5]
    # shares are exact within a block of 1024 samples, of which a pass has 48
    assert of_small == pytest.approx(24, abs=12)
    (line,) = found.passes.lines(recipe_of(steps))
    assert line == "12 steps = 1 pass over 48 sequences (by data.sources[].weight: 0.667 over large.jsonl, 2 over small.jsonl)"


def recipe_of(steps: int, task: str = "pretrain") -> Recipe:
    given = {"data": {"task": task}, "batch": {"global_sequences": GLOBAL}, "train": {"steps": steps}}
    return Recipe.model_validate(given)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_more_passes_than_help_are_warned_of(task: str) -> None:
    passes, most = one_source(100 * GLOBAL), TASKS[task].repeats.most
    (line,) = passes.lines(recipe_of(100 * most, task))
    assert line == f"{100 * most:,} steps = {most} passes over 400 sequences"
    _, warning = passes.lines(recipe_of(102 * most, task))
    assert warning.startswith("warning: ")
    assert "arXiv:" in warning


def test_a_small_source_with_a_large_weight_is_warned_of() -> None:
    passes = Passes((Drawn("large", 10_000, 0.5), Drawn("small", 100, 0.5)))
    said, warning = passes.lines(recipe_of(1000))
    assert said == (
        "1,000 steps = 0.396 passes over 10,100 sequences (by data.sources[].weight: 0.2 over large, 20 over small)"
    )
    assert warning.startswith("warning: 20 passes over small: up to 4, ")


# ------------------------------------------------------------------------------------------------------------- recipes


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as refused:
        load("r.json", overrides)
    (line,) = refused.value.lines
    return line


@pytest.mark.usefixtures("folder")
def test_steps_or_epochs() -> None:
    resolved = load("r.json")
    assert resolved.recipe.train.steps is None
    assert resolved.origins["train.steps"] == "derived"
    assert "train.epochs = 2.7 and train.steps = 10 both say how long the run is" in refusal("train.steps=10")
    assert "train.epochs = 0: must be a number > 0" in refusal("train.epochs=0")
    assert "write 3 without quotes" in refusal('train.epochs="3"')
    taken_back = load("r.json", ["train.epochs=null"])
    assert (taken_back.recipe.train.steps, taken_back.origins["train.steps"]) == (100, "default")
    either = load("r.json", ["train.epochs=null", "train.steps=7"])
    assert (either.recipe.train.steps, either.origins["train.steps"]) == (7, "--set")


@pytest.mark.usefixtures("folder")
def test_an_inherited_length_is_taken_back_by_null() -> None:
    Path("base.json").write_text(json.dumps({"train": {"steps": 2000}}))
    write(extends="base.json")
    assert "null takes back one that is inherited" in refusal()
    write(train={"steps": None, "epochs": 1.0})
    assert load("r.json").recipe.train.steps is None


@pytest.mark.usefixtures("folder")
def test_settled_once_for_schedule_and_steps() -> None:
    resolved = load("r.json", ["schedule.name=wsd"])
    assert resolved.recipe.schedule.decay_steps is None
    done = settled(resolved, one_source(48))
    assert (done.recipe.train.steps, done.recipe.train.epochs) == (33, 2.7)
    assert done.recipe.schedule.decay_steps == 7  # a fifth, rounded up
    values = done.as_resolved_json()["values"]
    assert values["train.steps"] == {"value": 33, "origin": "derived"}
    assert values["schedule.decay_steps"] == {"value": 7, "origin": "derived"}
    assert values["train.epochs"] == {"value": 2.7, "origin": "file r.json"}
    assert Recipe.model_validate(done.recipe.model_dump()) == done.recipe


@pytest.mark.usefixtures("folder")
def test_what_does_not_fit_into_the_steps_is_refused_when_they_are_known() -> None:
    for overrides, said in (
        (["schedule.warmup_steps=40"], "schedule.warmup_steps = 40 is longer than train.steps = 33"),
        (["schedule.name=wsd", "schedule.decay_steps=40"], "schedule.decay_steps 40 is more than train.steps = 33"),
        (["train.epochs=1e12"], "legal: up to 4294967296 steps; lower train.epochs"),
    ):
        with pytest.raises(RecipeError) as refused:
            settled(load("r.json", overrides), one_source(48))
        assert said in refused.value.lines[0]
        assert "over 48 sequences is " in refused.value.lines[0]


def test_check_says_the_passes_where_the_cache_knows_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> list[str]:
        assert main(["check", "r.json"]) == 0
        return capsys.readouterr().out.splitlines()

    before = said()
    assert [line.partition(":")[0] for line in before[:3]] == ["step", "layout", "model"]
    assert before[3] == "train.epochs 2.7: its steps are known after `triaxis data prepare` with this recipe"
    assert main(["data", "prepare", "r.json"]) == 0
    line = "33 steps (train.epochs 2.7) = 2.75 passes over 48 sequences"
    assert line in capsys.readouterr().out.splitlines()
    assert said()[3] == line
    assert main(["check", "r.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["train.steps"] == {"value": 33, "origin": "derived"}
    assert main(["check", "r.json", "--set", "schedule.warmup_steps=34"]) == 78
    with (folder / "small.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert said() == before, "other data than was tokenized"


@pytest.mark.usefixtures("folder")
def test_submit_warns_and_refuses_before_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", "r.json", "--nodes", "1", "--ranks-per-node", "1", "--dry-run"]
    assert main(["data", "prepare", "r.json"]) == 0
    assert main([*command, "--set", "train.epochs=9"]) == 0
    assert "triaxis: warning: 9 passes over the data: up to 4" in capsys.readouterr().err
    assert main([*command, "--set", "schedule.warmup_steps=34"]) == 78
    assert "is 33 steps: schedule.warmup_steps = 34 is longer" in capsys.readouterr().err


def test_check_of_steps_without_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "r.json", "--set", "train.epochs=null", "--set", "train.steps=1000"]) == 0
    line = "1,000 steps draw 4,000 sequences; the passes over the data are known after `triaxis data prepare` with this recipe"
    assert capsys.readouterr().out.splitlines()[3] == line


def test_a_damaged_note_is_no_note(folder: Path) -> None:
    data = load("r.json").recipe.data
    found = prepared(data.model_dump())
    assert kept(folder / "cache", data) == found.passes
    (note,) = (folder / "cache").glob("*.passes.json")
    note.write_text(note.read_text().replace("48", "x").replace("36", '"36"'))
    assert kept(folder / "cache", data) is None


def test_the_stamp_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    data = schema.Data.model_validate({"sources": [{"path": str(tmp_path / "texts")}]})
    stamps = [stamp_of(data)]
    for name in ("a.txt", "b.txt", ".git/index"):
        (tmp_path / "texts" / name).write_text(name)
        stamps.append(stamp_of(data))
    (tmp_path / "texts" / "link").symlink_to("nowhere")
    stamps.append(stamp_of(data))
    (tmp_path / "texts" / "a.txt").write_text("another")
    stamps.append(stamp_of(data))
    assert stamps[3] == stamps[2], "hidden files are not read"
    assert len(set(stamps)) == len(stamps) - 1


# ------------------------------------------------------------------------------------------------ a run that goes on


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cosine", "the cosine now ends at step 2,000; the learning rate at step 1,001 is "),
        ("linear", "the linear now ends at step 2,000; the learning rate at step 1,001 is "),
        ("wsd", "wsd now falls from step 1,601 to 2,000; the learning rate at step 1,001 is 0.001, and was 0.0001 by"),
        ("constant", "constant does not depend on it; the learning rate at step 1,001 is 0.001, as by the earlier plan"),
        ("inverse_sqrt", "inverse_sqrt does not depend on it; the learning rate at step 1,001 is "),
    ],
)
def test_more_steps_say_what_they_do_to_the_learning_rate(name: str, said: str) -> None:
    def recipe(steps: int) -> Recipe:
        given = {"schedule": {"name": name, "warmup_steps": 10}, "optimizer": {"lr": 1e-3}, "train": {"steps": steps}}
        return Recipe.model_validate(given)

    earlier, now = recipe(1000), recipe(2000)
    line = changed_length(earlier, now, 1000)
    assert line is not None
    assert line.startswith(f"train.steps 1,000 → 2,000: {said}")
    will_be = lr_at(1000, schedule=now.schedule, peak=1e-3, total_steps=2000)
    then = lr_at(1000, schedule=earlier.schedule, peak=1e-3, total_steps=1000)
    assert f"is {will_be:.3g}" in line
    assert (f"was {then:.3g} by the earlier plan" in line) == (name in ("cosine", "linear", "wsd"))
    assert changed_length(now, now, 1000) is None
    shorter = changed_length(now, earlier, 1000)
    assert shorter is not None
    assert shorter.endswith("no step is left of it")
