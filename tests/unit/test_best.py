"""Which evaluation is the best, which checkpoint has it, and which keys ask for that."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoints import ALONE, State, blank, save, write_checkpoint
from trainer.checkpoint.best import Best, Contest, to_remember
from trainer.checkpoint.choice import weights_of
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.listing import survey
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.save import Saver
from trainer.errors import RecipeError
from trainer.model.measures import MEASURES, OF_TRANSLATIONS, Aim, EvalResult
from trainer.recipe import load, load_given
from trainer.recipe.best import aim_of
from trainer.schema import Recipe
from trainer.tasks import TASKS
from trainer.track.evaluations import Evaluations, out_of_patience

NAN = math.nan
LOWER, HIGHER = Aim("eval_loss", "lower"), Aim("eval_accuracy", "higher")


def evaluations(*losses: float, every: int = 10) -> Evaluations:
    return Evaluations([{"step": every * n, "eval_loss": loss} for n, loss in enumerate(losses, 1)])


# ------------------------------------------------------------------------------------------------ which one is better


@pytest.mark.parametrize(
    ("aim", "value", "best", "better"),
    [
        (LOWER, 2.0, 2.1, True),
        (LOWER, 2.1, 2.1, False),  # the earlier of equal ones stays
        (LOWER, 2.2, 2.1, False),
        (HIGHER, 0.6, 0.5, True),
        (HIGHER, 0.5, 0.6, False),
        (LOWER, 9.9, None, True),
        (HIGHER, 0.0, None, True),
    ],
)
def test_better_is_what_the_figure_says(aim: Aim, value: float, best: float | None, better: bool) -> None:
    assert aim.improves(value, best) is better


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, None])
def test_what_is_not_finite_is_never_the_best(value: float | None) -> None:
    for aim in (LOWER, HIGHER):
        found = aim.value({aim.figure: value})
        assert found is None
        assert not aim.improves(found, None)
        assert not aim.improves(found, 1e9)
        assert aim.improves(1e9, None), "the first finite one is"
    assert to_remember({"eval_loss": value, "eval_targets": 3}, "d") == {"data": "d", "figures": {"eval_targets": 3}}


@pytest.mark.parametrize("task", TASKS)
def test_every_figure_of_a_task_is_in_its_records_and_has_a_direction(task: Any) -> None:
    measures = MEASURES[task](2)
    record = measures.record(EvalResult((1.0,) * measures.num_sums, 4, tokens_per_byte=0.5))
    assert measures.figures["eval_loss"] == "lower"
    assert set(measures.figures) - set(OF_TRANSLATIONS) <= set(record)
    neither = set(record) - set(measures.figures)
    assert neither <= {"eval_targets", "eval_majority"}, "these are of the data, not of the model"


# ----------------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("losses", "idle"),
    [
        ((), 0),
        ((3.0,), 0),
        ((3.0, 2.0, 1.0), 0),
        ((3.0, 2.0, 2.0, 2.5), 2),
        ((3.0, 2.0, 2.5, 1.9), 0),
        ((NAN, NAN), 2),
        ((2.0, NAN, 2.1), 2),
        ((NAN, 3.0, NAN), 1),
    ],
)
def test_evaluations_without_a_better_one_are_counted(losses: tuple[float, ...], idle: int) -> None:
    assert evaluations(*losses).idle(LOWER) == idle


def test_the_line_of_patience_names_the_best() -> None:
    recipe = Recipe.model_validate({"train": {"patience": 2}})
    assert out_of_patience(recipe, evaluations(3.0, 2.0, 2.5)) == ""
    assert out_of_patience(recipe, evaluations(3.0, 2.0, 2.5, 2.25)) == (
        "2 evaluations in a row without a better eval_loss than 2 of step 20 (train.patience 2)"
    )
    assert out_of_patience(Recipe(), evaluations(3.0, *[4.0] * 99)) == ""


def test_a_rewind_forgets_what_was_measured_after_it() -> None:
    found = evaluations(3.0, 2.0, 2.5)
    assert found.of(30) == {"eval_loss": 2.5}
    assert found.of(25) == {}
    found.rewind(20)
    assert (found.of(30), found.of(20), found.idle(LOWER)) == ({}, {"eval_loss": 2.0}, 0)


# ------------------------------------------------------------------------------------------------- which checkpoint


def evaluated(checkpoints: Path, losses: dict[int, float | None], *, data: str = "held out") -> CheckpointFolder:
    """Whole checkpoints with the evaluation that their manifests remember."""
    recipe = asking().model_dump(mode="json")
    for step, loss in losses.items():
        figures = {} if loss is None else {"eval_loss": loss, "eval_targets": 296}
        memory = {"evaluation": to_remember(figures, data)}
        write_checkpoint(checkpoints, step, change=lambda manifest, memory=memory: replace(
            manifest, recipe=recipe, state={**manifest.state, "memory": memory}
        ))  # fmt: skip
    return CheckpointFolder(checkpoints)


def asking(best: str = "eval_loss") -> Recipe:
    given = {"train": {"eval_every": 5}, "checkpoint": {"best": best}, "model": {"family": "gpt2"}}
    return load_given(given, Path("given")).recipe


def contest(recipe: Recipe, data: str = "held out") -> Contest:
    found = Contest.of(recipe, data)
    assert found is not None
    return found


def test_the_best_is_read_from_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    folder, compared = evaluated(tmp_path, {10: 3.0, 20: 2.0, 30: 2.0, 40: None, 50: 2.5}), contest(asking())
    assert compared.best(folder) == Best(20, 2.0)
    (folder.of_step(20) / MANIFEST).write_bytes(b"{}")
    assert compared.best(folder) == Best(30, 2.0), "a damaged manifest says nothing"
    folder.set_aside(folder.of_step(30), "damaged", "a test")
    assert compared.best(folder) == Best(50, 2.5)
    assert compared.best(CheckpointFolder(tmp_path / "none")) is None
    assert Contest.of(Recipe(), "held out") is None


def test_what_was_measured_on_other_data_is_not_compared(tmp_path: Path) -> None:
    """A loss on 8 sequences says nothing beside one on 256."""
    folder = evaluated(tmp_path, {10: 1.0}, data="8 sequences of it")
    evaluated(tmp_path, {20: 2.0})
    assert contest(asking()).best(folder) == Best(20, 2.0)
    assert contest(asking(), "8 sequences of it").best(folder) == Best(10, 1.0)
    assert contest(asking("eval_accuracy")).best(folder) is None


def test_the_spared_one_stays_however_old_it_is(tmp_path: Path) -> None:
    saver = Saver(CheckpointFolder(tmp_path), ALONE, keep=1, asynchronous=False)
    for step in (10, 20, 30):
        saver.save(blank(step), State(), save_beside=lambda folder: None, spared=[10])  # type: ignore[arg-type]
    assert [step for step, _ in saver.folder.steps()] == [30, 10]
    assert save(tmp_path, 40, keep=1) == ""
    assert [step for step, _ in saver.folder.steps()] == [40]


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "checkpoints", {10: 2.0, 20: 3.0})
    chosen = weights_of(str(tmp_path), option="CHECKPOINT")
    assert (chosen.path, chosen.why) == (folder.of_step(10), "step 10, the best eval_loss 2; the newest, step 20, has 3")
    chosen = weights_of(str(tmp_path), option="CHECKPOINT", last=True)
    assert (chosen.path, chosen.why) == (folder.of_step(20), "step 20, the newest, with eval_loss 3; the best, step 10, has 2")
    chosen = weights_of(str(folder.of_step(20)), option="CHECKPOINT")
    assert (chosen.path, chosen.why) == (folder.of_step(20), "")
    with pytest.raises(RecipeError, match="--last chooses a run's newest checkpoint, and "):
        weights_of(str(folder.of_step(20)), option="CHECKPOINT", last=True)
    listing = survey(tmp_path, verify=False)
    assert [(entry.figure, entry is listing.best) for entry in listing.entries] == [(3.0, False), (2.0, True)]


def test_a_run_without_a_best_key_stands_for_its_newest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", 10)
    newest = write_checkpoint(tmp_path / "checkpoints", 20)
    for last in (False, True):
        assert weights_of(str(tmp_path), option="CHECKPOINT", last=last).path == newest


# ---------------------------------------------------------------------------------------------------------- the keys

ROWS = [{"path": "rows.jsonl"}]
CLASSIFY = {"model": {"family": "bert", "config": {"max_position_embeddings": 512}}, "data": {"task": "classify"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"checkpoint": {"best": "loss"}},
            'checkpoint.best = "loss": the evaluations of data.task "pretrain" have no such figure; did you mean "eval_loss"? '
            'legal: "eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy"',
        ),
        (
            {"checkpoint": {"best": "eval_f1"}},
            'checkpoint.best = "eval_f1": the evaluations of data.task "pretrain" have no such figure; legal: "eval_loss", '
            '"eval_perplexity", "eval_bits_per_byte", "eval_accuracy"',
        ),
        (
            {"checkpoint": {"best": "eval_loss"}, "train": {"eval_every": 0}},
            "checkpoint.best is used only with train.eval_every above 0, not 0: remove it",
        ),
        (
            {"train": {"eval_every": 0, "patience": 3}},
            "train.patience is used only with train.eval_every above 0, not 0: remove it",
        ),
        (
            {"checkpoint": {"best": "eval_loss", "every": 0}},
            'checkpoint.best = "eval_loss" keeps a checkpoint, and checkpoint.every 0 keeps none: set checkpoint.every, or '
            "remove checkpoint.best",
        ),
        (
            {**CLASSIFY, "data": {**CLASSIFY["data"], "sources": ROWS, "classes": ["a", "b", "c"]}}
            | {"checkpoint": {"best": "eval_f1_positive"}},
            'checkpoint.best = "eval_f1_positive": the evaluations of data.task "classify" have no such figure; legal: '
            '"eval_loss", "eval_accuracy", "eval_f1"',
        ),
    ],
)
def test_keys_that_cannot_be_followed_are_one_line(changes: dict[str, Any], line: str, here: Path) -> None:
    (here / "recipe.json").write_text(json.dumps({"model": {"family": "gpt2"}, "train": {"eval_every": 5}} | changes))
    with pytest.raises(RecipeError) as caught:
        load(here / "recipe.json")
    assert [said.partition("recipe.json")[2].partition(": ")[2] or said for said in caught.value.lines] == [line]


def test_translations_are_measured_during_training_only_where_they_are_asked_for(here: Path) -> None:
    (here / "a.txt").write_text("a\n")
    pairs = [{"path": "a.txt", "target_path": "a.txt"}]
    given = {
        "model": {"family": "marian"},
        "data": {"task": "translate", "sources": pairs, "eval_sources": pairs},
        "train": {"eval_every": 5},
        "checkpoint": {"best": "eval_bleu"},
    }
    with pytest.raises(RecipeError, match=r'checkpoint\.best = "eval_bleu" is measured on translations, and train\.eval_tr'):
        load_given(given, here / "recipe.json")
    given["train"] = {"eval_every": 5, "eval_translations": 8}
    assert aim_of(load_given(given, here / "recipe.json").recipe) == Aim("eval_bleu", "higher")
