"""No damage to a checkpoint passes, nothing in it is ever executed, and no name leads out of it.

The checkpoints here are made without training: four small tensors with one optimizer state, cut over two files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.messages import Messages
from parallel.pieces import Fragment, Piece
from tests.unit.checkpoints import ALONE, SHAPES, STATES, forged, save, values_of, write_checkpoint
from tests.unit.model_folders import Bomb, assert_refused, read_all, saved
from tools.campaign import damage
from tools.campaign.damage import DAMAGES, OUTSIDE, Originals, at_most, judge_case, kind_of, sealed
from trainer.checkpoint.folder import HUGGING_FACE, REASON, CheckpointFolder, files_in
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.resume import CheckpointSource, Found, examine, newest_whole
from trainer.checkpoint.tensor_file import TensorFile, write_tensor_file
from trainer.errors import DataError, RecipeError
from trainer.model.hugging_face import INDEX, SINGLE, PretrainedWeights
from trainer.update_rules import WEIGHT


def reason_why(checkpoint: Path) -> str:
    """Why `newest_whole` does not use it: it must be set aside, and the one of step 10 be returned."""
    found, remarks = newest_whole(CheckpointFolder(checkpoint.parent), ALONE)
    assert found is not None
    assert found.path.name == "step-00000010"
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    reason = (aside / REASON).read_text()
    assert remarks == [f"warning: checkpoint {checkpoint.name} is not used: {reason.strip()}; set aside as {aside.name}"]
    return reason


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The checkpoint of step 20; that of step 10 is beside it."""
    write_checkpoint(tmp_path / "run" / "checkpoints", 10)
    return write_checkpoint(tmp_path / "run" / "checkpoints", 20)


# ------------------------------------------------------------------------------------------------- random damages

SLICE = 18  # cases of each kind


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    folder = tmp_path_factory.mktemp("originals")
    older, newest, later = (write_checkpoint(folder / "run", step) for step in (3, 6, 9))
    return Originals(newest, older, later, write_checkpoint(folder / "other", 6, seed=7))


@pytest.mark.parametrize("kind", DAMAGES)
def test_random_damages(kind: str, originals: Originals, tmp_path: Path) -> None:
    """A slice of `tools/campaign/damage.py`: found, named, set aside, and the older one is there."""
    cases = [case for case in range(SLICE * len(DAMAGES)) if kind_of(case) == kind]
    verdicts = {case: judge_case(1, case, originals, tmp_path / "case") for case in cases}
    assert len(verdicts) == SLICE
    assert {case: verdict.said for case, verdict in verdicts.items() if not verdict.passed} == {}


def test_the_judge_notices_a_reader_that_believes_everything(
    originals: Originals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def believing(folder: CheckpointFolder, messages: Messages) -> tuple[Found, list[str]]:
        return Found(folder.steps()[0][1], Manifest.read(originals.newest)), []

    monkeypatch.setattr(damage, "newest_whole", believing)
    verdict = judge_case(1, 0, originals, tmp_path / "case")
    assert (verdict.silent, verdict.passed) == (True, False)


def test_when_none_is_whole_a_run_does_not_start_from_scratch(newest: Path) -> None:
    checkpoints = CheckpointFolder(newest.parent)
    for _, path in checkpoints.steps():
        os.truncate(path / "rank-00001.safetensors", 100)
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(DataError, match=r"no checkpoint is whole .*start from scratch with --resume never") as caught:
            newest_whole(checkpoints, ALONE)
        assert caught.value.exit_code == 65
    assert checkpoints.steps() == []
    assert [path.name for path in checkpoints.set_aside_ones()] == ["step-00000010.damaged", "step-00000020.damaged"]


def test_where_there_never_was_one_there_is_none(tmp_path: Path) -> None:
    assert newest_whole(CheckpointFolder(tmp_path / "checkpoints"), ALONE) == (None, [])


def test_what_cannot_be_read_is_named(newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails."""
    opened = os.open

    def failing(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path == newest / "rank-00001.safetensors":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", failing)
    assert reason_why(newest) == f"{newest}/rank-00001.safetensors: cannot be read: Input/output error\n"


# ------------------------------------------------------------------------------------------------ nothing is executed


def canaries(made: Path) -> dict[str, bytes]:
    """What makes the folder `made` when somebody unpickles it: plain, as torch writes it, in a tar, behind a length."""
    plain = pickle.dumps(Bomb(made))
    zipped, archive = io.BytesIO(), io.BytesIO()
    torch.save(Bomb(made), zipped)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("data.pkl")
        member.size = len(plain)
        tar.addfile(member, io.BytesIO(plain))
    return {"plain": plain, "zip": zipped.getvalue(), "tar": archive.getvalue(), "long": struct.pack("<Q", 8) + plain}


RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
OTHER_FILES = (f"{HUGGING_FACE}/config.json", f"{HUGGING_FACE}/tokenizer.json")
FILES = (MANIFEST, *RANK_FILES, *OTHER_FILES)
EXTRAS = (
    *("rng_state.pth", "scheduler.pt", "optimizer.pt", "dataloader.pt", "client_state.pt", ".metadata", "__0_0.distcp"),
    *(
        "latest",
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "data.pkl",
        "rank-00002.safetensors",
    ),
    *(f"{HUGGING_FACE}/pytorch_model.bin", f"{HUGGING_FACE}/training_args.bin", "__init__.py", "sitecustomize.py"),
)
FORMS = ("plain", "zip", "tar", "long")


def read_everything(checkpoint: Path, manifest: Manifest) -> None:
    source = CheckpointSource(Found(checkpoint, manifest), states=["exp_avg"])
    for name, shape in SHAPES.items():
        for state in (WEIGHT, *source.states(name)):
            source.read(Fragment.whole(Piece.whole(name, shape)), state)
            Reader(checkpoint, manifest).whole(name, state)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """Where the canaries would make a folder; each is tried at the end, or the test would prove nothing."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a canary was executed"
    pickle.loads(canaries(path)["plain"])
    assert path.exists(), "the canary must be live"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*FILES, *EXTRAS])
def test_a_pickle_is_refused_by_the_choice_and_the_examination(name: str, form: str, newest: Path, made: Path) -> None:
    (newest / name).write_bytes(canaries(made)[form])
    with pytest.raises(DataError, match=name):
        examine(newest, ALONE)
    assert reason_why(newest).startswith(f"{newest / name}: ")


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_is_refused_by_an_export(form: str, newest: Path, made: Path, tmp_path: Path) -> None:
    from trainer.checkpoint.export import export

    whole = {name: (newest / name).read_bytes() for name in FILES}
    for name in (*FILES, *EXTRAS):
        (newest / name).write_bytes(canaries(made)[form])
        with pytest.raises(DataError, match=name):
            export(newest, tmp_path / "out")
        (newest / name).write_bytes(whole[name]) if name in whole else (newest / name).unlink()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_came_after_the_examination_is_no_tensor_file(form: str, newest: Path, made: Path) -> None:
    manifest = examine(newest, ALONE)
    for name in (*OTHER_FILES, *EXTRAS):  # read by nobody who reads tensors
        (newest / name).write_bytes(canaries(made)[form])
        read_everything(newest, manifest)
    for name in RANK_FILES:
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(canaries(made)[form])
        with pytest.raises(DataError, match=name):
            read_everything(newest, manifest)
        (newest / name).write_bytes(whole)
    (newest / MANIFEST).write_bytes(canaries(made)[form])
    with pytest.raises(DataError, match=MANIFEST):
        Manifest.read(newest)


# -------------------------------------------------------------------------------------------- no name leads out

MORE_OUTSIDE = (
    *("../step-00000010/rank-00000.safetensors", "hugging_face/../../../metrics.jsonl", "/dev/zero", "//x", "x/", "/", "."),
    *("...", "a/b/c/d/e", "-", "--help", "a b", "a\tb", "a\x1b[2Jb", "a\u202eb", "ｒank-00000.safetensors", "x" * 129, "a\\b"),
    *("rank-00000.safetensors\n", "\ud800", "file:///etc/passwd", "%2e%2e/x", "hugging_face/.x", "nul\0/../x", "x;touch y"),
)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", [*OUTSIDE, *MORE_OUTSIDE])
def test_a_file_name_that_leads_out_is_refused_as_such(name: str, position: int, newest: Path) -> None:
    forged(newest, lambda body: body["files"][position].__setitem__(0, name))
    reason = reason_why(newest)
    assert reason.startswith(f"{newest / MANIFEST}: damaged (file name ")
    assert reason.endswith(" leads out of the folder)\n")
    assert reason[:-1].isprintable()


def test_a_file_outside_is_not_read_even_if_it_is_what_the_manifest_says(newest: Path) -> None:
    """It is a pipe: whoever opened it would wait for ever."""
    os.mkfifo(newest.parent / "x")
    forged(newest, lambda body: body["files"][0].__setitem__(0, "../x"))
    with at_most(5.0):
        assert "'../x' leads out of the folder" in reason_why(newest)


NAMES_OF_NONE = (
    *("step-1", "step-0000021", "step-00000021x", "xstep-00000021", "step-00000021.damaged", "step-00000021 ", "Step-00000021"),
    *("step--0000021", "step-+0000021", "step-000_0021", ".step-00000021.draft", "step-00000021\n", "step-0000002a"),
    *("step-٠٠٠٠٠٠٢١", "step-００００００２１", "step-000000021"),
)


@pytest.mark.parametrize("name", NAMES_OF_NONE)
def test_a_folder_that_is_named_almost_like_a_checkpoint_is_none(name: str, newest: Path) -> None:
    """One of them is the twenty-first step in other digits, one has a digit too many for it."""
    whole = write_checkpoint(newest.parent, 21)
    whole.rename(newest.parent / name)
    assert [path for _, path in CheckpointFolder(newest.parent).steps()] == [newest, newest.with_name("step-00000010")]


def test_a_step_of_nine_digits_is_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 123_456_789)
    assert path.name == "step-123456789"
    assert CheckpointFolder(tmp_path).steps() == [(123_456_789, path)]


def test_a_file_that_is_named_like_a_checkpoint_is_told(newest: Path) -> None:
    """Nothing is gone on from as if it were not there."""
    newest.with_name("step-00000030").write_bytes(b"")
    with pytest.raises(DataError, match="step-00000030: it has a checkpoint's name and is no folder"):
        CheckpointFolder(newest.parent).steps()


# ------------------------------------------------------------------------------------------------ links and modes


def test_a_link_to_a_checkpoint_is_followed_unless_it_leads_nowhere(newest: Path, tmp_path: Path) -> None:
    """As where it was moved to another disk; the link is removed with it, and what it leads to stays."""
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 30)
    link = newest.with_name("step-00000030")
    link.symlink_to(elsewhere)
    found, remarks = newest_whole(CheckpointFolder(newest.parent), ALONE)
    assert found is not None
    assert (found.path, remarks) == (link, [])
    write_checkpoint(newest.parent, 40)
    assert link in CheckpointFolder(newest.parent).prune(keep=1)
    assert elsewhere.is_dir()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a link to what is not there: is its disk mounted"):
        CheckpointFolder(newest.parent).steps()


@pytest.mark.parametrize("name", FILES)
def test_a_link_for_a_file_is_refused_though_its_bytes_are_the_same(name: str, newest: Path, tmp_path: Path) -> None:
    (newest / name).rename(tmp_path / "moved")
    (newest / name).symlink_to(tmp_path / "moved")
    assert reason_why(newest).startswith(f"{newest / name}: ")


def test_a_link_for_a_folder_is_refused(newest: Path, tmp_path: Path) -> None:
    (newest / HUGGING_FACE).rename(tmp_path / "moved")
    (newest / HUGGING_FACE).symlink_to(tmp_path / "moved")
    assert f"{newest / HUGGING_FACE}" in reason_why(newest)


@contextmanager
def little_memory() -> Iterator[None]:
    """A GiB more than there is in use, so that a reader that wants all of it fails here, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_device_for_a_manifest_is_not_read(newest: Path) -> None:
    """/dev/zero never ends."""
    (newest / MANIFEST).unlink()
    (newest / MANIFEST).symlink_to("/dev/zero")
    with little_memory():
        assert reason_why(newest).startswith(f"{newest / MANIFEST}: ")


def test_an_enormous_manifest_is_not_read(newest: Path) -> None:
    """A hole of a tebibyte takes no room on the disk."""
    os.truncate(newest / MANIFEST, 1 << 40)
    with little_memory():
        assert reason_why(newest).startswith(f"{newest / MANIFEST}: ")


def test_a_dangling_link_under_the_name_for_what_is_set_aside_is_passed_over(newest: Path, tmp_path: Path) -> None:
    newest.with_name(f"{newest.name}.damaged").symlink_to(tmp_path / "nowhere")
    (newest / "extra").write_bytes(b"")
    found, _ = newest_whole(CheckpointFolder(newest.parent), ALONE)
    assert found is not None
    assert found.path.name == "step-00000010"
    assert (newest.with_name(f"{newest.name}.damaged-2") / REASON).is_file()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_the_reason_is_not_written_through_what_is_there_under_its_name(kind: str, newest: Path, tmp_path: Path) -> None:
    target = tmp_path / "victim"
    target.write_text("precious")
    makers: dict[str, Callable[[Path], None]] = {"link": lambda path: path.symlink_to(target), "pipe": os.mkfifo}
    makers.get(kind, Path.mkdir)(newest / REASON)
    (newest / REASON / "x" if kind == "folder" else newest / "extra").write_bytes(b"")
    with at_most(5.0):
        assert "not of this checkpoint" in reason_why(newest)
    assert target.read_text() == "precious"


@pytest.mark.parametrize("kind", ["link to a folder", "link to a file", "dangling link", "folder", "file"])
def test_what_was_planted_under_the_name_of_a_draft_does_no_harm(kind: str, newest: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    planted = newest.with_name(".step-00000030.draft")
    if kind == "folder":
        planted.mkdir()
        (planted / "rank-00000.safetensors").symlink_to(outside / "precious")
    elif kind == "file":
        planted.write_bytes(b"")
    else:
        planted.symlink_to(
            {"link to a folder": outside, "link to a file": outside / "precious"}.get(kind, tmp_path / "nowhere")
        )
    draft = CheckpointFolder(newest.parent).begin(30)
    assert list(draft.iterdir()) == []
    assert not draft.is_symlink()
    assert stat.S_IMODE(draft.stat().st_mode) == 0o700
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("precious", "x")]


def test_what_is_planted_in_a_draft_is_not_written_through(newest: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    folder = CheckpointFolder(newest.parent)
    draft = folder.begin(30)
    for name in ("rank-00000.safetensors", MANIFEST):
        (draft / name).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_tensor_file(draft / "rank-00000.safetensors", {}, ())
    with pytest.raises(FileExistsError):
        folder.commit(draft, 30, b"{}")
    assert (tmp_path / "precious").read_text() == "x"
    assert folder.steps()[0][1] == newest


@pytest.mark.parametrize("asynchronous", [False, True])
def test_files_and_folders_are_the_owner_s_alone_whatever_the_umask(asynchronous: bool, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert save(tmp_path / "run" / "checkpoints", 1, asynchronous=asynchronous) == ""
        (tmp_path / "run" / "checkpoints" / "step-00000001" / "rank-00000.safetensors").write_bytes(b"damaged")
        with pytest.raises(DataError):
            newest_whole(CheckpointFolder(tmp_path / "run" / "checkpoints"), ALONE)
    finally:
        os.umask(before)
    paths = list((tmp_path / "run").rglob("*"))
    assert len(paths) == 7
    for path in (tmp_path / "run", *paths):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["a b.py", ".hidden", "é.txt", "x" * 200])
def test_a_checkpoint_that_could_not_be_read_again_is_not_committed(name: str, tmp_path: Path) -> None:
    """Others' code chooses the names of the files beside the weights; what may not be read must not be written."""
    failure = save(tmp_path, 1, name=name)
    steps = CheckpointFolder(tmp_path).steps()
    if failure:
        assert "leads out of the folder" in failure
        assert steps == []
    else:
        examine(steps[0][1], ALONE)


# ---------------------------------------------------------------------------------------------- headers of tensor files


def tensor_file(path: Path, header: bytes | dict[str, Any], *, length: int | None = None, values: int = 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(values))
    return path


def read_both(path: Path) -> list[Tensor]:
    file, both = TensorFile(path), [torch.ones(8), torch.ones(8)]
    for name, out in zip(("a", "b"), both, strict=True):
        file.read(name, 0, out)
    return both


def entry(begin: Any, end: Any, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    size = (end - begin) // 4 if isinstance(begin, int) and isinstance(end, int) else 0
    return {"dtype": dtype, "shape": [size] if shape is None else shape, "data_offsets": [begin, end]}


A, B = entry(0, 32), entry(32, 64)
BAD_HEADERS: dict[str, tuple[bytes | dict[str, Any], int | None]] = {
    "longer than any file": (b"", 2**63),
    "longest": (b"", 2**64 - 1),
    "longer than this file": (b"{}", 10_000),
    "a byte too long": ({"a": A, "b": B}, len(json.dumps({"a": A, "b": B})) + 1),
    "a byte too short": ({"a": A, "b": B}, len(json.dumps({"a": A, "b": B})) - 1),
    "empty": (b"", 0),
    "not JSON": (b"{'a': 1}", None),
    "not UTF-8": (b"\xff" * 8, None),
    "list": (b"[]", None),
    "number": (b"3", None),
    "null": (b"null", None),
    "text": (b'"x"', None),
    "deep": (b"[" * 100_000, None),
    "deep entry": (b'{"a":' * 100_000, None),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", None),
    "entry is a number": ({"a": 3, "b": B}, None),
    "entry is null": ({"a": None, "b": B}, None),
    "entry is a list": ({"a": [], "b": B}, None),
    "no format": ({"a": {"shape": [8], "data_offsets": [0, 32]}, "b": B}, None),
    "unknown format": ({"a": {**A, "dtype": "F31"}, "b": B}, None),
    "format is a list": ({"a": {**A, "dtype": ["F32"]}, "b": B}, None),
    "other format than size": ({"a": {**A, "dtype": "F64"}, "b": B}, None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [8]}, "b": B}, None),
    "one offset": ({"a": {**A, "data_offsets": [0]}, "b": B}, None),
    "three offsets": ({"a": {**A, "data_offsets": [0, 16, 32]}, "b": B}, None),
    "offsets are text": ({"a": entry("0", "32"), "b": B}, None),
    "offsets are fractions": ({"a": entry(0.0, 32.0), "b": B}, None),
    "offset is huge": ({"a": entry(0, 2**63), "b": B}, None),
    "offset is negative": ({"a": entry(-32, 32), "b": B}, None),
    "both offsets are negative": ({"a": entry(-64, -32), "b": B}, None),
    "offsets are reversed": ({"a": entry(32, 0), "b": B}, None),
    "beyond the end": ({"a": A, "b": entry(32, 68)}, None),
    "overlap": ({"a": entry(0, 36), "b": B}, None),
    "same place": ({"a": entry(0, 64), "b": entry(0, 64)}, None),
    "hole": ({"a": entry(0, 28), "b": B}, None),
    "rest at the end": ({"a": A, "b": entry(32, 60)}, None),
    "other shape than size": ({"a": {**A, "shape": [9]}, "b": B}, None),
    "twice": (b'{"a":%b,"b":%b,"a":%b}' % tuple(json.dumps(slot).encode() for slot in (A, B, A)), None),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_header_that_is_wrong_is_refused_at_once(fault: str, tmp_path: Path) -> None:
    """Though its file has the right checksum: whoever wrote it sealed it too."""
    header, length = BAD_HEADERS[fault]
    path = tensor_file(tmp_path / "x.safetensors", header, length=length)
    with at_most(2.0), pytest.raises(DataError, match=r"x\.safetensors"):
        read_both(path)


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": A, "b": B})
    assert [values.tolist() for values in read_both(path)] == [[0.0] * 8] * 2


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_header_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(DataError, match=r"/x: "):
        TensorFile(tmp_path / "x").read("a", 0, torch.empty(1))


def test_an_enormous_file_is_not_read_to_its_end(newest: Path) -> None:
    """A hole of a tebibyte takes no room, and a quarter of an hour to hash."""
    os.truncate(newest / "rank-00000.safetensors", 1 << 40)
    with at_most(5.0):
        reason = reason_why(newest)
    assert reason.startswith(f"{newest / 'rank-00000.safetensors'}: damaged ({1 << 40} bytes, ")


# ----------------------------------------------------------------------------------------- imported Hugging Face folders


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_beside_the_weights_is_left_alone(form: str, made: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "tf_model.h5"):
        (folder / name).write_bytes(canaries(made)[form])
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    read_all(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_under_the_name_of_weights_is_refused(form: str, made: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / SINGLE).write_bytes(canaries(made)[form])
    assert_refused(folder, DataError, 65, f"{folder / SINGLE}: cannot be read")


@pytest.mark.parametrize("form", FORMS)
def test_an_index_that_names_a_pickle_is_refused(form: str, made: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    with PretrainedWeights(folder)._open(SINGLE) as file:
        names = list(file.keys())
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(canaries(made)[form])
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model.bin")}))
    assert_refused(folder, DataError, 65, "pytorch_model.bin: cannot be read")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_pickle_for_json_is_refused(name: str, form: str, made: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    if name == INDEX:
        (folder / SINGLE).unlink()  # which is read instead where it is there
    (folder / name).write_bytes(canaries(made)[form])
    assert_refused(folder, DataError, 65, name)


def test_an_index_of_pickles_alone_is_refused(made: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / SINGLE).unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(canaries(made)["zip"])
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}))
    assert_refused(folder, RecipeError, 78, "give a Hugging Face folder with weights")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_great_depth_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    if name == INDEX:
        (folder / SINGLE).unlink()
    (folder / name).write_bytes(b"[" * 100_000)
    assert_refused(folder, DataError, 65, name)


# --------------------------------------------------------------------------------------------------- sanity of the above


def test_the_checkpoints_of_these_tests_are_whole(newest: Path) -> None:
    found, remarks = newest_whole(CheckpointFolder(newest.parent), ALONE)
    assert found is not None
    assert (found.path, remarks) == (newest, [])
    assert sorted(files_in(newest)) == sorted(FILES)
    reader = Reader(newest, found.manifest)
    for name in SHAPES:
        for state in STATES:
            assert torch.equal(reader.whole(name, state), values_of(name, state, 20))


def test_the_seal_of_these_tests_is_the_manifest_s_own(newest: Path) -> None:
    data = (newest / MANIFEST).read_bytes()
    assert sealed(json.loads(data)) == data
    assert hashlib.sha256(data).hexdigest() != json.loads(data)["sha256"]
    shutil.rmtree(newest)
