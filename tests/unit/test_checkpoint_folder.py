"""What a checkpoint says of itself, the folder they lie in, and what a run may go on from."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.messages import Messages
from parallel.pieces import Fragment, Piece
from tests.unit.checkpoints import FACTS, blank, forged, save, write_checkpoint
from tools.campaign.cases import write_recipe
from tools.campaign.damage import sealed
from trainer import cli
from trainer.checkpoint import save as save_module
from trainer.checkpoint.export import export
from trainer.checkpoint.facts import CHANGES, NOT_OF_THE_MODEL, data_facts, model_facts, recipe_facts, refusals
from trainer.checkpoint.folder import REASON, CheckpointFolder, files_in
from trainer.checkpoint.manifest import MANIFEST, File, LogicalTensor, Manifest
from trainer.checkpoint.model_card import require_export
from trainer.checkpoint.resume import Found, newest_whole
from trainer.checkpoint.resume_check import Resume, as_json, checkpoint_named, finished
from trainer.checkpoint.runs import Stored
from trainer.engine.loss_scale import LossScaler
from trainer.errors import DataError, RecipeError
from trainer.model.hf_config import to_hf
from trainer.recipe import ResolvedRecipe, load
from trainer.run.start import agree, begin_again, claim, find, leave_behind
from trainer.run_folder import RunFolder

ALONE = Messages.alone()

# ---------------------------------------------------------------------------------------------------- the manifest

B = Piece.whole("b", (2, 3), transposed=True)
SMALL = replace(
    blank(3),
    versions={"torch": "é\n"},
    files=(File("rank-00000.safetensors", 64, "0" * 64), File("hugging_face/config.json", 2, "f" * 64)),
    tensors={
        "b": LogicalTensor.of((2, 3), {"weight": "F32", "exp_avg": "BF16"}, (Stored(0, Fragment.whole(B)),)),
        "a": LogicalTensor.of((), {"weight": "I64"}, (Stored(0, Fragment.whole(Piece.whole("a", ()))),)),
    },
)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    again = Manifest.decode(SMALL.encode())
    assert again == SMALL
    assert list(again.tensors) == ["b", "a"], "in the order of the model"
    assert again.encode() == SMALL.encode()
    assert (again.num_bytes, again.tensors["b"].num_bytes) == (66, 6 * (4 + 2))


def test_every_changed_byte_of_a_manifest_is_noticed() -> None:
    """One bit of each byte, and each byte left out or written twice."""
    data, stream = SMALL.encode(), random.Random(0)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1 << stream.randrange(8)]) + data[at + 1 :]
        for damaged in (changed, data[:at] + data[at + 1 :], data[:at] + data[at : at + 1] + data[at:]):
            if damaged != data:
                with pytest.raises(ValueError):  # noqa: PT011 - JSON, UTF-8, the checksum: whichever sees it first
                    Manifest.decode(damaged)


def test_every_beginning_of_a_manifest_is_refused() -> None:
    data = SMALL.encode()
    for length in range(len(data)):
        with pytest.raises(ValueError):  # noqa: PT011
            Manifest.decode(data[:length])


Body = dict[str, Any]
MISSHAPEN: dict[str, Callable[[Body], object]] = {
    "format": lambda body: body.update(format="triaxis checkpoint 3"),
    "no format": lambda body: body.pop("format"),
    "no files": lambda body: body.pop("files"),
    "no tensors": lambda body: body.pop("tensors"),
    "no step": lambda body: body.pop("step"),
    "a key too many": lambda body: body.update(more=1),
    "files are a number": lambda body: body.update(files=3),
    "a file is a number": lambda body: body["files"].append(3),
    "a file is short": lambda body: body["files"][0].pop(),
    "a file's name is a number": lambda body: body["files"][0].__setitem__(0, 3),
    "a file's name is null": lambda body: body["files"][0].__setitem__(0, None),
    "a file's name is a list": lambda body: body["files"][0].__setitem__(0, []),
    "a file twice": lambda body: body["files"].append(body["files"][0]),
    "tensors are a list": lambda body: body.update(tensors=[]),
    "a tensor is null": lambda body: body["tensors"].update(b=None),
    "a tensor is short": lambda body: body["tensors"]["b"].pop(),
    "a shape is a number": lambda body: body["tensors"]["b"].__setitem__(0, 6),
    "a shape is text": lambda body: body["tensors"]["b"].__setitem__(0, ["2", "3"]),
    "a shape is larger": lambda body: body["tensors"]["b"].__setitem__(0, [2, 4]),
    "no state": lambda body: body["tensors"]["b"].__setitem__(1, {}),
    "a state of no format": lambda body: body["tensors"]["b"].__setitem__(1, {"weight": "F31"}),
    "a state's format is a list": lambda body: body["tensors"]["b"].__setitem__(1, {"weight": ["F32"]}),
    "no fragments": lambda body: body["tensors"]["b"].__setitem__(2, []),
    "fragments are a number": lambda body: body["tensors"]["b"].__setitem__(2, 3),
    "a fragment is short": lambda body: body["tensors"]["b"][2][0].pop(),
    "a fragment is null": lambda body: body["tensors"]["b"][2].append(None),
    "a fragment's file is beyond": lambda body: body["tensors"]["b"][2][0].__setitem__(0, 2),
    "a fragment's file is negative": lambda body: body["tensors"]["b"][2][0].__setitem__(0, -1),
    "a fragment's file is text": lambda body: body["tensors"]["b"][2][0].__setitem__(0, "0"),
    "a fragment's count is text": lambda body: body["tensors"]["b"][2][0].__setitem__(4, "6"),
    "a fragment's count is larger": lambda body: body["tensors"]["b"][2][0].__setitem__(4, 7),
}


@pytest.mark.parametrize("fault", MISSHAPEN)
def test_a_manifest_that_is_sealed_and_makes_no_sense_is_refused(fault: str, tmp_path: Path) -> None:
    body = json.loads(SMALL.encode())
    MISSHAPEN[fault](body)
    (tmp_path / MANIFEST).write_bytes(sealed(body))
    with pytest.raises(DataError, match=rf"{MANIFEST}: damaged \((?!its checksum)"):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_is_no_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / MANIFEST}: No such file or directory: not a complete checkpoint"):
        Manifest.read(tmp_path)


def test_numbers_that_are_none_are_never_written() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        replace(SMALL, state={"memory": float("nan")}).encode()


# ---------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints")


def steps(folder: CheckpointFolder) -> list[int]:
    return [step for step, _ in folder.steps()]


def test_the_newest_comes_first_whatever_was_written_last(folder: CheckpointFolder) -> None:
    assert steps(folder) == []
    for step in (9, 100_000_000, 10, 99_999_999):
        write_checkpoint(folder.path, step)
    assert steps(folder) == [100_000_000, 99_999_999, 10, 9]
    assert [path.name for _, path in folder.steps()][::3] == ["step-100000000", "step-00000009"]


def test_a_draft_is_no_checkpoint_until_it_is_committed(folder: CheckpointFolder) -> None:
    """A crash at any point before the rename leaves what was there before."""
    write_checkpoint(folder.path, 1)
    draft = folder.begin(2)
    assert steps(folder) == [1]
    (draft / "rank-00000.safetensors").write_bytes(b"x")
    (draft / MANIFEST).write_bytes(b"{}")
    assert steps(folder) == [1]
    assert folder.begin(2) == draft, "and the next save begins again"
    assert list(draft.iterdir()) == []
    assert folder.commit(draft, 2, b"{}\n") == folder.of_step(2)
    assert steps(folder) == [2, 1]
    assert not draft.exists()
    assert (folder.of_step(2) / MANIFEST).read_bytes() == b"{}\n"


def test_what_crashes_left_goes_with_the_next_save(folder: CheckpointFolder) -> None:
    kept = write_checkpoint(folder.path, 1)
    for name in (".step-00000002.draft", ".step-00000003.draft", ".step-00000000.removed"):
        (folder.path / name / "hugging_face").mkdir(parents=True)
        (folder.path / name / "hugging_face" / "config.json").write_text("{}")
    (folder.path / "notes.txt").write_text("not ours")
    draft = folder.begin(4)
    assert sorted(folder.path.iterdir()) == sorted([draft, folder.path / "notes.txt", kept])


def test_a_checkpoint_is_never_written_over_another(folder: CheckpointFolder) -> None:
    there = write_checkpoint(folder.path, 5)
    before = {name: (there / name).read_bytes() for name in files_in(there)}
    draft = folder.begin(5)
    with pytest.raises(OSError, match="not empty"):
        folder.commit(draft, 5, b"{}")
    assert {name: (there / name).read_bytes() for name in files_in(there)} == before


def test_what_is_set_aside_is_out_of_the_choice_with_its_reason(folder: CheckpointFolder) -> None:
    for n, name in enumerate(("step-00000007.damaged", "step-00000007.damaged-2", "step-00000007.damaged-3")):
        aside = folder.set_aside(write_checkpoint(folder.path, 7), "damaged", f"reason {n}")
        assert aside == folder.path / name
        assert (aside / REASON).read_text() == f"reason {n}\n"
    other = folder.set_aside(write_checkpoint(folder.path, 7), "superseded", "the run went on from elsewhere")
    assert steps(folder) == []
    assert [path.name for path in folder.set_aside_ones()][-1] == other.name == "step-00000007.superseded"
    assert len(folder.set_aside_ones()) == 4


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_only_the_newest_are_kept(keep: int, folder: CheckpointFolder) -> None:
    for step in range(1, 6):
        write_checkpoint(folder.path, step)
    folder.set_aside(folder.of_step(1), "damaged", "x")
    gone = folder.prune(keep)
    assert steps(folder) == [5, 4, 3, 2][:keep]
    assert [path.name for path in gone] == [f"step-{step:08d}" for step in [5, 4, 3, 2][keep:]]
    assert [path.name for path in folder.path.glob(".*")] == []
    assert len(folder.set_aside_ones()) == 1, "what is set aside is for somebody to look at"
    assert folder.prune(keep) == []


def test_one_that_is_being_removed_is_out_of_the_choice_before_its_first_file_goes(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(folder.path, step)
    seen = []

    def killed(path: Path) -> None:
        seen.append((steps(folder), sorted(files_in(path))))
        raise OSError(5, "killed here")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(OSError, match="killed here"):
            folder.prune(1)
    assert seen == [([2], sorted(files_in(folder.of_step(2))))]
    assert [path.name for path in folder.path.glob(".*")] == [".step-00000001.removed"]
    assert folder.prune(1) == [], "the run's next start removes it, also where nothing is saved any more"
    assert [path.name for path in folder.path.iterdir()] == ["step-00000002"]
    (folder.path / ".step-00000001.removed").mkdir()
    folder.begin(3)
    assert sorted(path.name for path in folder.path.iterdir()) == [".step-00000003.draft", "step-00000002"]


def test_the_disk_is_asked_even_before_the_folder_is_there(folder: CheckpointFolder) -> None:
    assert not folder.path.exists()
    assert folder.free_bytes() > 0


# ---------------------------------------------------------------------------------------------------- saving


def test_a_save_keeps_as_many_as_it_should(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3, 4):
        assert save(folder.path, step, keep=2) == ""
    assert steps(folder) == [4, 3]
    found, _ = newest_whole(folder, ALONE)
    assert found is not None
    assert found.manifest.step == 4


def test_older_ones_stay_when_the_newest_does_not_read_back(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns something else than was written: seen before the only good checkpoint is removed."""
    assert save(folder.path, 1, keep=1) == ""
    commit = CheckpointFolder.commit

    def with_a_bad_disk(self: CheckpointFolder, draft: Path, step: int, manifest: bytes) -> Path:
        path = commit(self, draft, step, manifest)
        with (path / "rank-00000.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        return path

    monkeypatch.setattr(CheckpointFolder, "commit", with_a_bad_disk)
    failure = save(folder.path, 2, keep=1)
    assert failure == f"{folder.of_step(2)}/rank-00000.safetensors: damaged (its checksum does not match)"
    assert steps(folder) == [1]
    assert [path.name for path in folder.set_aside_ones()] == ["step-00000002.damaged"]


def test_a_full_disk_costs_one_checkpoint_and_leaves_no_litter(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(folder.path, 1) == ""
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "free_bytes", lambda self: 7)
        failure = save(folder.path, 2)
    assert "the disk is full" in failure
    assert "7 are free" in failure
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-00000001"]
    assert save(folder.path, 3) == ""


def test_a_disk_that_is_full_in_the_middle_leaves_no_litter(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(folder.path, 1) == ""

    def full(path: Path, *rest: object) -> File:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "write_tensor_file", full)
        failure = save(folder.path, 2)
    assert failure.startswith("rank 0: ")
    assert failure.endswith(".step-00000002.draft/rank-00000.safetensors: No space left on device")
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-00000001"]
    assert save(folder.path, 3) == ""


# ---------------------------------------------------------------------------------------------------- facts

SAVED = {
    "data.task": "causal_lm",
    **FACTS,
    "model.config.n_embd": 32,
    "model.config.activation": "gelu",
    **data_facts(tokenizer="t1", samples="s1"),
}


def test_what_is_the_same_goes_on() -> None:
    assert refusals("ckpt", 4, SAVED, dict(SAVED), ()) == []
    assert refusals("ckpt", 4, SAVED, {}, ()) == []
    assert refusals("ckpt", 4, {}, SAVED, ()) == [], "what an older version did not save is not asked for"


@pytest.mark.parametrize("word", CHANGES)
def test_what_may_be_allowed_says_how_and_what_becomes_of_it(word: str) -> None:
    key, effect = CHANGES[word]
    given = {**SAVED, key: "other"}
    (line,) = refusals("ckpt", 4, SAVED, given, ())
    assert line == (
        f'{key}: ckpt was saved with {json.dumps(SAVED[key])}, this run has "other": set it back, '
        f"or allow it with --allow-change {word} ({effect})"
    )
    assert refusals("ckpt", 4, SAVED, given, [word]) == []
    assert refusals("ckpt", 4, SAVED, given, [other for other in CHANGES if other != word]) == [line]


def test_another_batch_is_refused_with_the_equation() -> None:
    (line,) = refusals("ckpt", 5, SAVED, {**SAVED, "batch.global_sequences": 12}, list(CHANGES))
    assert line == (
        "batch.global_sequences: ckpt was saved with 8, this run has 12: it has consumed 5 steps × 8 = 40 sequences, "
        "and step × 12 would begin at others (40 / 12 = 3.33333): set it back"
    )


@pytest.mark.parametrize(("key", "other"), [("model.config.n_embd", 64), ("data.task", "masked_lm"), ("model.config.x", None)])
def test_another_model_is_refused_whatever_is_allowed(key: str, other: Any) -> None:
    saved = {**SAVED, "model.config.x": [1, 2]}
    (line,) = refusals("ckpt", 5, saved, {**saved, key: other}, list(CHANGES))
    assert line == (
        f"{key}: ckpt was saved with {json.dumps(saved[key])}, this run has {json.dumps(other)}: it is another model: "
        "set it back, or export the checkpoint and start from it"
    )


def test_a_key_that_the_model_has_no_more_is_refused_once_all_are_known() -> None:
    given = {key: value for key, value in SAVED.items() if key != "model.config.activation"}
    (line,) = refusals("ckpt", 5, SAVED, given, ())
    assert line == 'model.config.activation: ckpt was saved with "gelu", this run\'s model has no such key: set it back'
    early = {key: value for key, value in given.items() if key != "data.samples"}
    assert refusals("ckpt", 5, SAVED, early, ()) == []


def test_every_difference_has_its_line() -> None:
    assert len(refusals("ckpt", 5, SAVED, dict.fromkeys(SAVED, 1), ())) == len(SAVED)


def test_of_a_config_only_what_the_model_is_counts() -> None:
    config = {"n_embd": 32, **dict.fromkeys(NOT_OF_THE_MODEL, "x")}
    assert model_facts(config) == {"model.config.n_embd": 32}


# ------------------------------------------------------------------------------------------ where a run starts


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def begun(run: RunFolder, *, reached: int, every: int | None) -> RunFolder:
    """A run that has logged its steps up to `reached` and saves every so many; None: its resolved.json is not there."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, reached + 1)))
    if every is not None:
        run.write_resolved({"values": {"checkpoint.every": {"value": every, "origin": "default"}}})
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_made(run: RunFolder) -> None:
    for how in ("auto", "never"):
        assert claim(run, Resume(how)) == []
        assert run.path.is_dir()
    assert find(run, Resume("auto"), ALONE) == (None, [])


@pytest.mark.parametrize("reached", [0, 1, 3, 4, 8])  # from 4 on its first checkpoint may have been under way
def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again(reached: int, run: RunFolder) -> None:
    (remark,) = begin_again(begun(run, reached=reached, every=4), Resume())
    assert remark == "the run was ended before its first checkpoint: it begins again at step 0"
    assert find(run, Resume(), ALONE) == (None, [])


@pytest.mark.parametrize("leave", ["nothing", "an empty folder", "a draft"])
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_again(leave: str, run: RunFolder) -> None:
    begun(run, reached=9, every=4)
    if leave != "nothing":
        run.checkpoints.mkdir()
    if leave == "a draft":
        (run.checkpoints / ".step-00000004.draft").mkdir()
    before = run.metrics.read_bytes()
    with pytest.raises(DataError) as caught:
        begin_again(run, Resume())
    assert caught.value.exit_code == 65
    assert caught.value.lines == [
        f"{run.checkpoints}: no checkpoint is there, though the run reached step 9 and saves every 4: bring the folder back "
        f"(is its disk mounted?), or choose another run.name (--set run.name=NAME), or --resume never, which moves {run.path} "
        "aside"
    ]
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize("every", [0, None])
def test_a_run_that_keeps_no_checkpoints_is_not_written_over(every: int | None, run: RunFolder) -> None:
    with pytest.raises(RecipeError, match=r"already holds a run, which kept no checkpoints: choose another run\.name"):
        begin_again(begun(run, reached=9, every=every), Resume())


def test_a_damaged_history_is_named_before_anything_is_done(run: RunFolder) -> None:
    begun(run, reached=2, every=4)
    run.metrics.write_text('{"step": 1}\nnot JSON\n')
    with pytest.raises(DataError, match=rf"{run.metrics}:2: not a JSON record"):
        begin_again(run, Resume())


def test_never_moves_what_is_there_aside(run: RunFolder) -> None:
    for n in (1, 2):
        begun(run, reached=n, every=4)
        write_checkpoint(run.checkpoints, 4)
        (remark,) = claim(run, Resume("never"))
        aside = run.path.with_name(f"run.before-{n}")
        assert remark == f"the run that was in {run.path} is now in {aside}"
        assert names(run.path) == []
        assert names(aside) == [".holder.json", ".lock", "checkpoints", "metrics.jsonl", "resolved.json"]
        assert find(run, Resume("never"), ALONE) == (None, [])
    assert len(RunFolder(run.path.with_name("run.before-2")).metrics.read_text().splitlines()) == 2


def test_a_run_goes_on_from_its_newest_checkpoint(run: RunFolder) -> None:
    begun(run, reached=9, every=4)
    for step in (4, 8):
        write_checkpoint(run.checkpoints, step)
    assert claim(run, Resume()) == []
    found, remarks = find(run, Resume(), ALONE)
    assert found is not None
    assert (found.path.name, found.manifest.step, found.manifest.sequences, remarks) == ("step-00000008", 8, 64, [])


def test_checkpoints_that_are_all_damaged_are_no_reason_to_begin_again(run: RunFolder) -> None:
    begun(run, reached=9, every=4)
    for step in (4, 8):
        (write_checkpoint(run.checkpoints, step) / MANIFEST).write_bytes(b"")
    for _ in range(2):
        assert claim(run, Resume()) + begin_again(run, Resume()) == []
        with pytest.raises(DataError, match=r"no checkpoint is whole .*step-00000004\.damaged, step-00000008\.damaged"):
            find(run, Resume(), ALONE)


def test_checkpoints_that_were_superseded_are_no_reason_to_begin_again(run: RunFolder) -> None:
    """The run went on from step 4, and step 4 has been lost since: what is left is not what it would have gone on from."""
    begun(run, reached=9, every=4)
    older, newer = (write_checkpoint(run.checkpoints, step) for step in (4, 8))
    leave_behind(Found(older, Manifest.read(older)), run)
    shutil.rmtree(older)
    assert not newer.exists()
    with pytest.raises(DataError, match=r"step-00000008\.superseded|no checkpoint is there"):
        begin_again(run, Resume()) or find(run, Resume(), ALONE)


def test_a_named_checkpoint_of_the_run_itself(run: RunFolder) -> None:
    begun(run, reached=9, every=4)
    older, newer = (write_checkpoint(run.checkpoints, step) for step in (4, 8))
    resume = Resume(str(older))
    assert claim(run, resume) == []
    found, _ = find(run, resume, ALONE)
    assert found is not None
    assert found.path == older
    (remark,) = leave_behind(found, run)
    assert remark == f"{newer.name} is newer than what the run goes on from: set aside as {newer.name}.superseded"
    assert (newer.with_name(f"{newer.name}.superseded") / REASON).read_text() == f"the run went on from {older}\n"
    assert [step for step, _ in CheckpointFolder(run.checkpoints).steps()] == [4]
    assert leave_behind(found, run) == []


def test_a_named_checkpoint_of_another_run(run: RunFolder, tmp_path: Path) -> None:
    """Into a new folder it may be gone on with; over another run it may not."""
    theirs = write_checkpoint(tmp_path / "other" / "checkpoints", 6)
    assert claim(run, Resume(str(theirs))) == []
    found, _ = find(run, Resume(str(theirs)), ALONE)
    assert found is not None
    assert found.path == theirs
    begun(run, reached=1, every=4)
    with pytest.raises(RecipeError, match=f"already holds a run, and {theirs} is not a checkpoint of it"):
        claim(run, Resume(str(theirs)))


def test_a_named_checkpoint_that_is_damaged_is_refused_and_stays_where_it_is(run: RunFolder, tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path / "other" / "checkpoints", 6)
    os.truncate(theirs / "rank-00000.safetensors", 9)
    with pytest.raises(DataError, match=r"rank-00000\.safetensors: damaged \(9 bytes"):
        find(run, Resume(str(theirs)), ALONE)
    assert names(theirs.parent) == [theirs.name]


def test_a_checkpoint_may_be_named_in_three_ways(run: RunFolder, tmp_path: Path) -> None:
    for step in (4, 8):
        newest = write_checkpoint(run.checkpoints, step)
    for name in (newest, run.checkpoints, run.path):
        assert checkpoint_named(str(name)) == newest
    renamed = newest.rename(tmp_path / "best")
    assert checkpoint_named(str(renamed)) == renamed
    found, _ = find(run, Resume(str(renamed)), ALONE)
    assert found is not None
    assert found.manifest.step == 8, "under another name it is what its manifest says"


@pytest.mark.parametrize("name", ["nothing", "empty", "file", "file/checkpoints", "x" * 300, "a\0b", ""])
def test_a_name_of_no_checkpoint_says_what_may_be_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a recipe, say")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        checkpoint_named(name)
    assert caught.value.exit_code == 78
    assert "no checkpoint there; legal: auto, never, a checkpoint's folder, or a run's" in caught.value.lines[0]


def test_other_facts_are_refused_when_all_are_known(run: RunFolder) -> None:
    path = write_checkpoint(run.checkpoints, 8)
    found = Found(path, Manifest.read(path))
    agree(found, FACTS, Resume())
    other = {**FACTS, "precision.dtype": "bf16", "batch.global_sequences": 4}
    with pytest.raises(RecipeError) as caught:
        agree(found, other, Resume(allowed=("precision",)))
    assert len(caught.value.lines) == 1
    assert f"batch.global_sequences: {path} was saved with 8, this run has 4" in caught.value.lines[0]


# ------------------------------------------------------------------------------------------ before anything is loaded

STEPS = 8


@pytest.fixture
def resolved(tmp_path: Path) -> ResolvedRecipe:
    return load(write_recipe(tmp_path, steps=STEPS, every=4, keep=2))


def facts_of(resolved: ResolvedRecipe) -> dict[str, Any]:
    config = to_hf(resolved.network(vocab_size=257), dtype="float32", eos_token_id=256)
    return as_json({**recipe_facts(resolved.recipe), **model_facts(config), **data_facts(tokenizer="t", samples="s")})


def ended(run: RunFolder, resolved: ResolvedRecipe, *, reached: int, ended_by: str = "") -> Path:
    """A run with checkpoints up to that step, which has closed its history."""
    begun(run, reached=reached, every=4)
    for step in range(4, reached + 1, 4):
        newest = write_checkpoint(run.checkpoints, step, facts=facts_of(resolved))
    (run.path / "summary.json").write_text(json.dumps({"ended_by": ended_by} if ended_by else {"steps": reached}))
    run.report.write_text("")
    return newest


def test_a_run_that_is_finished_is_said_to_be(run: RunFolder, resolved: ResolvedRecipe, tmp_path: Path) -> None:
    ended(run, resolved, reached=STEPS)
    line = finished(resolved, str(run.path), Resume())
    assert line == (
        f"{run.path} has reached step 8 of 8: nothing to do; to go on, raise train.steps; for a new run, choose another "
        "run.name or --resume never"
    )
    assert finished(resolved, str(run.path), Resume("never")) == ""
    longer = load(tmp_path / "recipe.json", ["train.steps=12"])
    assert finished(longer, str(run.path), Resume()) == ""


def test_a_finished_run_is_exit_0_and_nothing_is_touched(
    run: RunFolder, resolved: ResolvedRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(run, resolved, reached=STEPS)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert cli.main(["train", str(tmp_path / "recipe.json"), "--run-dir", str(run.path)]) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in " ".join((captured.out + captured.err).split())
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize(
    "why",
    [
        "no checkpoint",
        "not at the end",
        "killed at the end",
        "killed at a later end",
        "not closed",
        "no report",
        "named",
        "damaged",
    ],
)
def test_a_run_that_is_not_finished(why: str, run: RunFolder, resolved: ResolvedRecipe) -> None:
    resume = Resume()
    if why != "no checkpoint":
        newest = ended(
            run, resolved, reached=4 if why == "not at the end" else STEPS, ended_by="x" * (why == "killed at the end")
        )
    if why == "killed at a later end":  # the files are those of the end before
        (run.path / "summary.json").write_text(json.dumps({"steps": 4}))
    if why == "not closed":
        (run.path / "summary.json").unlink()
    if why == "no report":
        run.report.unlink()
    if why == "named":
        resume = Resume(str(newest))
    if why == "damaged":
        (newest / MANIFEST).write_bytes(b"{}")
    assert finished(resolved, str(run.path), resume) == ""


@pytest.mark.parametrize(
    ("setting", "said", "word"),
    [
        ("batch.global_sequences=16", "batch.global_sequences: ", None),
        ("precision.dtype=bf16", "precision.dtype: ", "precision"),
        ("optimizer.name=lion", "optimizer.name: ", "optimizer"),
        ("model.config.n_embd=64", "model.config.n_embd: ", None),
        ("model.config.n_layer=2", "model.config.n_layer: ", None),
        ("model.config.resid_pdrop=0.0", "model.config.resid_pdrop: ", None),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_recipe_that_must_not_go_on_is_refused_at_the_door(
    setting: str, said: str, word: str | None, named: bool, run: RunFolder, resolved: ResolvedRecipe, tmp_path: Path
) -> None:
    newest = ended(run, resolved, reached=4)
    resume = Resume(str(newest) if named else "auto")
    assert finished(resolved, str(run.path), resume) == ""
    other = load(tmp_path / "recipe.json", [setting])
    with pytest.raises(RecipeError) as caught:
        finished(other, str(run.path), resume)
    assert caught.value.exit_code == 78
    line = caught.value.lines[0]  # another n_embd makes another n_inner: a line of its own
    assert line.startswith(f"{said}{newest} was saved with ")
    allowed = replace(resume, allowed=tuple(CHANGES))
    if word is not None:
        assert f"--allow-change {word}" in line
        assert finished(other, str(run.path), replace(resume, allowed=(word,))) == ""
        assert finished(other, str(run.path), allowed) == ""
    else:
        with pytest.raises(RecipeError):
            finished(other, str(run.path), allowed)
    assert finished(other, str(run.path), Resume("never")) == ""


def test_what_the_manifest_claims_of_its_facts_is_sealed(run: RunFolder, resolved: ResolvedRecipe) -> None:
    """Edited so that another recipe would pass, the checkpoint is damaged; sealed again, it is what somebody vouches for."""
    newest = ended(run, resolved, reached=4)
    forged(newest, lambda body: body["facts"].update({"precision.dtype": "bf16"}))
    with pytest.raises(RecipeError, match=r"precision\.dtype: .* was saved with \"bf16\""):
        finished(resolved, str(run.path), Resume())
    (newest / MANIFEST).write_bytes((newest / MANIFEST).read_bytes().replace(b'"bf16"', b'"fp32"', 1))
    with pytest.raises(DataError, match="its checksum does not match"):
        Manifest.read(newest)


# ---------------------------------------------------------------------------------------------------- the loss scale


@pytest.mark.parametrize(("window", "hysteresis"), [(1, 1), (4, 1), (5, 3)])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.7])
def test_a_loss_scale_goes_on_from_every_position_of_its_window(window: int, hysteresis: int, chance: float) -> None:
    """Through JSON, as a manifest holds it; over six windows with overflows in any place."""
    stream = random.Random(window * 10 + hysteresis)
    overflows = [stream.random() < chance for _ in range(6 * window)]
    scaler = LossScaler(2.0**8, window, hysteresis, minimum=0.5)
    states, scales = [scaler.state()], []
    for overflow in overflows:
        scaler.update(overflow=overflow)
        states.append(scaler.state())
        scales.append(scaler.scale)
    for position, state in enumerate(states):
        again = LossScaler(2.0**3, window, hysteresis, minimum=0.5)
        again.restore(json.loads(json.dumps(state)))
        assert again.state() == state
        got = []
        for overflow in overflows[position:]:
            again.update(overflow=overflow)
            got.append(again.scale)
        assert got == scales[position:]
        assert again == scaler


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_a_static_scale_stays_the_recipe_s(scale: float) -> None:
    scaler = LossScaler(scale)
    scaler.restore({"scale": 4096.0, "good_steps": 3, "overflows_left": 2})
    assert scaler == LossScaler(scale)


# ------------------------------------------------------------------------------------- what a user has is never written over


@pytest.mark.parametrize("out", ["home", "home/work", ".", "..", "file", "link"])
def test_an_export_goes_into_a_new_folder(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`triaxis export RUN ~` once put a model in the place of a home folder."""
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 3)
    (tmp_path / "home" / "work").mkdir(parents=True)
    (tmp_path / "home" / "work" / "thesis.tex").write_text("years")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("home")
    monkeypatch.chdir(tmp_path / "home")
    before = sorted(tmp_path.rglob("*"))
    folder = Path(out) if out.startswith(".") else tmp_path / out
    with pytest.raises(
        RecipeError, match="something is there already, and is not overwritten: give a new folder, or --replace"
    ):
        export(checkpoint, folder)
    with pytest.raises(RecipeError, match="is no export with a card of triaxis: remove it, or give another folder"):
        require_export(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["export", "reference"])
def test_a_run_does_not_begin_where_it_would_write_over_something(name: str, tmp_path: Path) -> None:
    (tmp_path / "home" / name).mkdir(parents=True)
    with pytest.raises(RecipeError, match=f"{name} is in it, which a run would write over, but no run"):
        claim(RunFolder(tmp_path / "home"), Resume())
    assert [path.name for path in (tmp_path / "home").iterdir()] == [name]
    (tmp_path / "home" / name).rmdir()
    (tmp_path / "home" / "job.sbatch").touch()  # what `submit` leaves there before
    assert claim(RunFolder(tmp_path / "home"), Resume()) == []


def test_a_run_does_not_write_its_copy_over_the_recipe_itself(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    with pytest.raises(RecipeError, match=r"recipe\.json is in it, which a run would write over"):
        claim(RunFolder(tmp_path), Resume(), [tmp_path / "base.json", recipe])
    (tmp_path / "metrics.jsonl").touch()
    assert claim(RunFolder(tmp_path), Resume(), [recipe]) == [], "a run's own copy of its recipe is as good as the recipe"


def test_a_run_in_the_current_folder_moves_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path / "run")
    assert RunFolder(Path()).move_aside() == tmp_path / "run.before-1"
    assert (tmp_path / "run.before-1" / "metrics.jsonl").exists()
