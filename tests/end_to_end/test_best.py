"""The best checkpoint and patience, as a user meets them: a run that learns a few documents by heart, so that what it measures
on others is best in its middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tools.campaign.cases import WAYS, Way, arguments, digests, numbers, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.best import evaluation
from trainer.checkpoint.manifest import Manifest
from trainer.cli import main
from trainer.cluster import requeue
from trainer.run_folder import RunFolder
from trainer.track import read_metrics

ONE = WAYS[0]
WAY = {way.name: way for way in WAYS}
STEPS, EVERY, SAVED_EVERY = 48, 6, 20


def overfitting(folder: Path, **more: Any) -> Path:
    """A recipe of 18 short documents that are alike, evaluated on 8 that are not."""
    folder.mkdir(parents=True, exist_ok=True)
    animals = [("red", "fox", "mat"), ("blue", "cat", "hat"), ("green", "dog", "log"), ("old", "owl", "bough")]
    animals += [("young", "pig", "wig"), ("sad", "hen", "pen")]
    few = [f"The {a} {b} number {i * 37 % 101} sat on the {c}." for i, (a, b, c) in enumerate(animals * 3)]
    others = ["Nine ships sailed over the seven seas.", "A bird sings where the river bends."]
    others += ["Rain fell on every roof in town.", "His boots were made for walking."]
    for name, texts in (("few", few), ("others", others * 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"sources": [{"path": str(folder / "few.jsonl")}], "eval_sources": [{"path": str(folder / "others.jsonl")}]}
    train = {"eval_every": EVERY, "clip_norm": 1.0, **more.pop("train", {})}
    checkpoint = {"best": "eval_loss", **more.pop("checkpoint", {})}
    path = write_recipe(
        folder,
        steps=STEPS,
        every=SAVED_EVERY,
        keep=1,
        data=data,
        train=train,
        checkpoint=checkpoint,
        batch={"micro_sequences": 4},
        optimizer={"lr": 0.01},
        schedule={"name": "constant", "warmup_steps": 4},
        **more,
    )
    recipe = json.loads(path.read_text())
    recipe["model"]["config"] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    del recipe["data"]["eval_fraction"]
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, run_dir: Path, *keys: str, way: Way = ONE, resume: str = "auto", body: Any = train) -> Ended:
    command = arguments(recipe, run_dir, way, *keys, resume=resume)
    return run_ranks(body, command, world_size=way.processes, log=run_dir.parent / "log")


def measured(run_dir: Path) -> dict[int, float]:
    return {
        int(record["step"] or 0): float(record["eval_loss"] or 0.0) for record in read_metrics(run_dir / "evaluations.jsonl")
    }


def best_of(run_dir: Path) -> int:
    found = measured(run_dir)
    return min(found, key=lambda step: found[step])


def kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*[0-9]"))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A recipe, its run in one process, and what it said."""
    folder = tmp_path_factory.mktemp("best")
    recipe = overfitting(folder)
    ended = run(recipe, folder / "run")
    assert ended.codes == (0,), ended.said
    return recipe, folder / "run", ended.said


@pytest.fixture
def copy(done: tuple[Path, Path, str], tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(done[1], tmp_path / "run"))


def test_the_best_is_kept_beside_the_newest_and_exported(done: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, run_dir, said = done
    losses, best = measured(run_dir), best_of(run_dir)
    assert 2 * EVERY < best < STEPS - 3 * EVERY, losses
    assert best % SAVED_EVERY, "it was saved for its evaluation, not because it was due"
    assert kept(run_dir) == [best, STEPS]
    assert evaluation(Manifest.read(checkpoint(run_dir, best)))["eval_loss"] == losses[best]
    assert f"exported: step {best}, the best eval_loss {losses[best]:.5g}; the last step had {losses[STEPS]:.5g}" in said
    closing = summary(run_dir)
    assert (closing["steps"], closing["best_step"], closing["eval_loss"]) == (STEPS, best, losses[best])
    for step in (best, STEPS):
        assert main(["export", str(checkpoint(run_dir, step)), str(tmp_path / str(step))]) == 0
    assert same_weights(run_dir / "export", tmp_path / str(best))
    assert not same_weights(run_dir / "export", tmp_path / str(STEPS))


def test_commands_that_are_given_the_run_take_its_best(
    done: tuple[Path, Path, str], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, losses = best_of(copy), measured(copy)
    assert main(["checkpoints", str(copy), "--prune", "1"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("step-")}
    assert f"{losses[best]:.5g} best" in rows[f"step-{best:08d}"]
    assert "best" not in rows[f"step-{STEPS:08d}"]
    assert kept(copy) == [best, STEPS]
    assert main(["export", str(copy), str(tmp_path / "best")]) == 0
    assert f"exported: step {best}, the best eval_loss {losses[best]:.5g}; the newest, step {STEPS}" in capsys.readouterr().out
    assert main(["export", str(copy / "checkpoints"), str(tmp_path / "last"), "--last"]) == 0
    assert f"exported: step {STEPS}, the newest, with eval_loss" in capsys.readouterr().out
    assert same_weights(tmp_path / "best", copy / "export")
    assert not same_weights(tmp_path / "last", copy / "export")
    assert main(["export", str(checkpoint(copy, best)), str(tmp_path / "one"), "--last"]) == 78
    assert main(["eval", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Other micro-batches: a sum of some hundred fp32 losses in another order.
    assert (found["step"], found["loss"]) == (best, pytest.approx(losses[best], rel=1e-6))


# ------------------------------------------------------------------------------------------------------- kill -9


def killed_between(at: int, arguments: Sequence[str]) -> int:
    """Train, and die at the best evaluation, before its checkpoint."""
    import trainer.loop

    real = trainer.loop.save

    def save(run: Any, meter: Any, guard: Any, *, steps_done: int) -> None:
        if steps_done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, meter, guard, steps_done=steps_done)

    trainer.loop.save = save
    return train(arguments)


def killed_before_commit(at: int, arguments: Sequence[str]) -> int:
    """Train, and die when the best checkpoint is a draft: every file is written, but its name."""
    return _killed_in(at, arguments, "commit")


def killed_before_prune(at: int, arguments: Sequence[str]) -> int:
    """Train, and die when the best checkpoint is there, and the best before it still is too."""
    return _killed_in(at, arguments, "prune")


def _killed_in(at: int, arguments: Sequence[str], name: str) -> int:
    from trainer.checkpoint.folder import CheckpointFolder

    real = getattr(CheckpointFolder, name)

    def dies(folder: CheckpointFolder, *words: Any, **named: Any) -> Any:
        step = words[1] if name == "commit" else folder.steps()[0][0]
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(folder, *words, **named)

    setattr(CheckpointFolder, name, dies)
    return train(arguments)


MOMENTS = (killed_between, killed_before_commit, killed_before_prune)
GRID = [
    pytest.param(moment, WAY[name], saving, marks=() if (moment, name) in EVERYDAY else pytest.mark.grid)
    for EVERYDAY in [{(killed_between, "one"), (killed_before_prune, "dp2-zero1")}]
    for moment in MOMENTS
    for name, saving in (("one", "false"), ("dp2-zero1", "true"), ("dp2-zero3", "false"), ("tp2", "true"), ("pp2", "false"))
]


@pytest.mark.parametrize(("moment", "way", "saving"), GRID)
def test_killed_around_the_best_it_ends_as_the_undisturbed(
    moment: Any, way: Way, saving: str, done: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """In the same layout to the bit: numbers, evaluations, which checkpoints there are, and their tensors."""
    recipe, undisturbed, _ = done
    keys = (f"checkpoint.async={saving}",)
    if way is not ONE:
        undisturbed = tmp_path / "undisturbed"
        ended = run(recipe, undisturbed, *keys, way=way)
        assert set(ended.codes) == {0}, ended.said
    best, run_dir = best_of(undisturbed), tmp_path / "killed"
    ended = run(recipe, run_dir, *keys, way=way, body=partial(moment, best))
    assert -signal.SIGKILL in ended.codes, ended.said
    assert (best in kept(run_dir)) == (moment is killed_before_prune)
    ended = run(recipe, run_dir, *keys, way=way)
    assert set(ended.codes) == {0}, ended.said
    assert "resumed after step" in ended.said
    assert numbers(run_dir) == numbers(undisturbed)
    assert read_metrics(run_dir / "evaluations.jsonl") == read_metrics(undisturbed / "evaluations.jsonl")
    assert kept(run_dir) == kept(undisturbed) == [best, STEPS]
    for step in (best, STEPS):
        assert digests(checkpoint(run_dir, step)) == digests(checkpoint(undisturbed, step))
    assert same_weights(run_dir / "export", undisturbed / "export")
    assert summary(run_dir)["best_step"] == best


def test_a_damaged_best_gives_way_to_the_next(done: tuple[Path, Path, str], copy: Path) -> None:
    """It is hashed when it is needed, at the end."""
    recipe, best = done[0], best_of(copy)
    weights = next(checkpoint(copy, best).glob("rank-*"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    ended = run(recipe, copy, f"train.steps={STEPS + EVERY}", "checkpoint.keep=2")
    assert ended.codes == (0,), ended.said
    assert f"warning: checkpoint step-{best:08d} is not used" in ended.said
    assert (checkpoint(copy, best).with_suffix(".damaged") / "reason.txt").exists()
    losses = measured(copy)
    second = min((STEPS, STEPS + EVERY), key=lambda step: losses[step])
    assert summary(copy)["best_step"] == second
    assert f"exported: step {second}, the best eval_loss" in ended.said


@pytest.mark.grid
def test_going_on_from_the_best_leaves_what_came_after_it(done: tuple[Path, Path, str], copy: Path) -> None:
    recipe, best = done[0], best_of(copy)
    lower = ("optimizer.lr=0.0001", f"train.steps={best + 2 * EVERY}")
    ended = run(recipe, copy, *lower, resume=str(checkpoint(copy, best)))
    assert ended.codes == (0,), ended.said
    assert "set aside as step-00000048.superseded" in ended.said
    assert max(measured(copy)) == best + 2 * EVERY
    assert summary(copy)["best_step"] == best_of(copy)
    assert kept(copy) == sorted({best_of(copy), best + 2 * EVERY})


# ------------------------------------------------------------------------------------------------------- patience


def test_patience_ends_the_run_and_the_count_survives_a_kill(tmp_path: Path) -> None:
    recipe = overfitting(tmp_path, train={"patience": 3})
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    ended = run(recipe, undisturbed)
    assert ended.codes == (0,), ended.said
    losses, best = measured(undisturbed), best_of(undisturbed)
    end = max(losses)
    # 1.5 evaluations before its end, in the middle of the count.
    assert run(recipe, run_dir, "checkpoint.every=3", body=partial(killed_between, end)).codes == (-signal.SIGKILL,)
    assert kept(run_dir)[-1] == end - 3
    ended = run(recipe, run_dir, "checkpoint.every=3")
    assert ended.codes == (0,), ended.said
    reason = f"3 evaluations in a row without a better eval_loss than {losses[best]:.5g} of step {best} (train.patience 3)"
    assert f"ended by patience at step {end} of {STEPS}: {reason}" in ended.said
    assert (end, best) == (best + 3 * EVERY, summary(run_dir)["best_step"])
    assert (summary(run_dir)["steps"], summary(run_dir)["ended_early"]) == (end, reason)
    assert measured(run_dir) == losses
    assert kept(run_dir) == [best, end]
    assert same_weights(run_dir / "export", undisturbed / "export")


def test_a_run_that_patience_has_ended_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = overfitting(tmp_path, train={"patience": 1}, checkpoint={"best": "eval_accuracy"}), tmp_path / "run"
    since = int(tmp_path.stat().st_mtime)
    assert run(recipe, run_dir).codes == (0,)
    end = max(measured(run_dir))
    again = ["train", *arguments(recipe, run_dir, ONE)]
    assert main(again) == 0
    assert f"ended by patience at step {end} of {STEPS}: 1 evaluation in a row without a better eval_accuracy" in " ".join(
        capsys.readouterr().out.split()
    )
    for code in (0, 1):  # srun's, and what torchrun makes of any other
        assert requeue.verdict(RunFolder(run_dir), code, since, {}) == (code, f"the ranks ended with {code}: not queued again")
    assert main([*again, "--set", f"train.steps={STEPS * 2}"]) == 0
    assert max(measured(run_dir)) == end, "more steps are not more patience"
    ended = run(recipe, run_dir, "train.patience=4")
    assert ended.codes == (0,), ended.said
    assert f"resumed after step {end}" in ended.said
    assert max(measured(run_dir)) > end


# -------------------------------------------------------------------------------------------- known once the data is


def test_nothing_held_out_is_nothing_to_compare(tmp_path: Path) -> None:
    recipe = overfitting(tmp_path)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "A document of its own. " * 40}))
    value = json.loads(recipe.read_text())
    sources = [{"path": str(tmp_path / "one.jsonl")}]
    value["data"] = {"sources": sources, "seq_len": 32, "tokenizer": "bytes", "hold_out_tail": False}
    recipe.write_text(json.dumps(value))
    ended = run(recipe, tmp_path / "run", "data.eval_fraction=0.1")
    assert ended.codes == (78,), ended.said
    assert (
        "checkpoint.best compares evaluations, and data.eval_fraction 0.1 holds out none of these documents: raise it, give "
        "data.eval_sources, or remove checkpoint.best"
    ) in ended.said


def test_a_figure_of_two_classes_needs_two(tmp_path: Path) -> None:
    rows = [{"text": f"{n} by 3 leaves {n % 3}", "label": "abc"[n % 3]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"family": "bert", "config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}},
        "data": {"task": "classify", "sources": [{"path": str(tmp_path / "rows.jsonl")}], "seq_len": 32, "eval_fraction": 0.2},
        "train": {"steps": 2, "eval_every": 1},
        "checkpoint": {"best": "eval_f1_positive"},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    ended = run(tmp_path / "recipe.json", tmp_path / "run")
    assert ended.codes == (78,), ended.said
    assert (
        'checkpoint.best = "eval_f1_positive": the evaluations of a model of 3 classes have no such figure; legal: '
        '"eval_loss", "eval_accuracy", "eval_f1"'
    ) in ended.said


@pytest.mark.parametrize("way", [ONE, pytest.param(WAY["tp2"], marks=pytest.mark.grid)], ids=lambda way: way.name)
def test_the_best_bleu_is_measured_while_the_run_goes_on(way: Way, tmp_path: Path) -> None:
    for name, rows in (("rows", range(80)), ("held_out", range(8))):
        pairs = [{"source": f"{n} is", "target": "odd" if n % 2 else "even"} for n in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    recipe = {
        "model": {"family": "marian", "config": {"d_model": 32, **sizes, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}},
        "data": {
            **{"task": "translate", "seq_len": 32, "workers": 1},
            "sources": [{"path": str(tmp_path / "rows.jsonl")}],
            "eval_sources": [{"path": str(tmp_path / "held_out.jsonl")}],
        },
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 24, "eval_every": 8, "eval_translations": 8, "beams": 1},
        "checkpoint": {"best": "eval_chrf"},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    run_dir = tmp_path / "run"
    ended = run(tmp_path / "recipe.json", run_dir, way=way)
    assert set(ended.codes) == {0}, ended.said
    scores = {record["step"]: record["eval_chrf"] for record in read_metrics(run_dir / "evaluations.jsonl")}
    assert list(scores) == [8, 16, 24]
    best = max(scores, key=lambda step: scores[step] or 0.0)
    closing = summary(run_dir)
    assert (closing["best_step"], closing["eval_chrf"], closing["chrf"]) == (best, scores[best], scores[best])
    assert not (run_dir / "translating").exists()
