"""A saver of checkpoints: every rank writes its own file of a draft, and the first rank commits it.

    draft made ─► each rank: file written, fsynced, hashed ─► reports combined ─► manifest ─►
    rename ─► older checkpoints removed

The reports are combined on their way to the first rank, two at a time, so that no rank ever sees
all ranks' fragments one by one.

All ranks always go through the same exchanges, whatever fails on one of them. A disk that is full,
or a quota, costs this checkpoint, but neither the run nor the checkpoints before it.
"""

from __future__ import annotations

import operator
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.messages import Messages
from trainer.checkpoint.check import check_files
from trainer.checkpoint.folder import HUGGING_FACE, CheckpointFolder, files_in
from trainer.checkpoint.manifest import File, Manifest, key_of
from trainer.checkpoint.report import Report, both, completed, described, of_rank
from trainer.checkpoint.tensor_file import DTYPES, Slot, header_bytes, write_tensor_file
from trainer.engine.zero_state import StateFragment, ZeroState
from trainer.errors import DataError
from trainer.files.durable import FILE_MODE
from trainer.model.finite import is_finite
from trainer.update_rules import WEIGHT


@dataclass(frozen=True)
class Saved:
    """The outcome of a save.

    * `failure`: why there is no checkpoint, or "".
    * `not_finite`: the tensor that holds NaN or infinity, for which there is none, or "".
    * `began`: as in NotFinite.
    * `litter`: why older checkpoints are still there, or "".
    * `blocked_s`: how long the ranks could not train.
    """

    step: int
    failure: str = ""
    not_finite: str = ""
    began: int | None = None
    litter: str = ""
    num_bytes: int = 0
    blocked_s: float = 0.0
    total_s: float = 0.0


@dataclass
class Saver:
    """A writer of checkpoints, in the calling thread or behind it.

    Every rank must call it together. `keep`: how many checkpoints stay. `asynchronous`: the caller
    waits only for the copy to host memory, for which each rank needs room.
    """

    folder: CheckpointFolder
    messages: Messages
    keep: int
    asynchronous: bool
    # the step of the last checkpoint that was written
    saved_step: int | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _outcome: Saved | BaseException | None = field(default=None, init=False)

    def save(
        self,
        manifest: Manifest,
        state: ZeroState,
        *,
        save_beside: Callable[[Path], None],
        spared: Collection[int] = (),
    ) -> list[Saved]:
        """Save at a step's end, and return the outcomes that are known by now.

        They are those of an earlier save behind the run, and of this one. `manifest` has no files
        and tensors yet. `save_beside` puts the Hugging Face config, tokenizer and code into a
        folder. `spared`: the steps of checkpoints that stay, however old they are.
        """
        earlier = self.wait()
        started = time.monotonic()
        fragments = state.fragments()
        tensors: Iterable[Tensor] = state.tensors()
        if not self.asynchronous:
            saved = self._write(manifest, fragments, tensors, save_beside, spared)
            self._remember(saved)
            return [*earlier, replace(saved, blocked_s=time.monotonic() - started, total_s=time.monotonic() - started)]
        copied = [tensor.to("cpu", copy=True) for tensor in tensors]
        blocked_s = time.monotonic() - started

        def behind() -> None:
            try:
                saved = self._write(manifest, fragments, copied, save_beside, spared)
                self._outcome = replace(saved, blocked_s=blocked_s, total_s=time.monotonic() - started)
            except BaseException as error:
                self._outcome = error

        # a daemon: a dying run does not wait for it
        self._thread = threading.Thread(target=behind, name="checkpoint", daemon=True)
        self._thread.start()
        return earlier

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written behind, and return what came of it.

        What was raised there is raised here.
        """
        if self._thread is None:
            return []
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:
            return []
        self._remember(outcome)
        return [outcome]

    def _remember(self, saved: Saved) -> None:
        if not saved.failure:
            self.saved_step = saved.step

    def _write(
        self,
        manifest: Manifest,
        fragments: Sequence[StateFragment],
        tensors: Iterable[Tensor],
        save_beside: Callable[[Path], None],
        spared: Collection[int],
    ) -> Saved:
        messages, step = self.messages, manifest.step
        slots = _slots(fragments)
        own = len(header_bytes(slots)) + sum(slot.num_bytes for slot in slots.values())
        need = messages.combine(own, operator.add)
        draft = messages.broadcast(self._begin(step, need) if need is not None else None)
        if "failure" in draft:
            return Saved(step, draft["failure"])
        folder = Path(draft["folder"])
        report = _tried(lambda: self._write_own(folder, fragments, slots, tensors, save_beside), folder)
        whole = messages.combine(of_rank(messages.rank, report), both)
        verdict = messages.broadcast(self._commit(manifest, folder, whole) if whole is not None else None)
        if "failure" in verdict:
            began = manifest.not_finite_since
            return Saved(step, verdict["failure"], not_finite=verdict.get("not_finite", ""), began=began)
        outcome = self._make_room(self.folder.of_step(step), [File(*entry) for entry in report["files"]], spared)
        return Saved(step, outcome.get("failure", ""), litter=outcome.get("litter", ""), num_bytes=verdict["num_bytes"])

    def _begin(self, step: int, need: int) -> dict[str, Any]:
        def begin() -> dict[str, Any]:
            draft = self.folder.begin(step)
            free = self.folder.free_bytes()
            if free < need:
                draft.rmdir()
                raise OSError(f"{self.folder.path}: the disk is full: {need:,} bytes are needed, {free:,} are free")
            return {"folder": str(draft)}

        return _tried(begin, self.folder.path)

    def _write_own(
        self,
        draft: Path,
        fragments: Sequence[StateFragment],
        slots: dict[str, Slot],
        tensors: Iterable[Tensor],
        save_beside: Callable[[Path], None],
    ) -> dict[str, Any]:
        files: list[File] = []
        wrong: list[str] = []
        if fragments:
            checked = _noticing(fragments, tensors, wrong)
            files.append(write_tensor_file(draft / _file_name(self.messages.rank), slots, checked))
        if wrong:
            return {"failure": f"{wrong[0]} holds NaN or infinity", "not_finite": wrong[0]}
        if self.messages.is_first:
            files += _write_beside(draft / HUGGING_FACE, save_beside)
        entries = [[file.name, file.num_bytes, file.sha256] for file in files]
        return {"files": entries, "tensors": described(self.messages.rank, fragments)}

    def _commit(self, manifest: Manifest, draft: Path, report: Report) -> dict[str, Any]:
        def commit() -> dict[str, Any]:
            if report["not_finite"]:
                return {"failure": report["failures"][0], "not_finite": report["not_finite"][0]}
            if report["failures"]:
                raise OSError(report["failures"][0])
            complete = completed(manifest, report)
            complete.require_sound()
            present = set(files_in(draft))
            for file in complete.files:
                if file.name not in present:
                    raise OSError(f"{draft / file.name} was written by a rank that has another disk: give a shared run.dir")
            self.folder.commit(draft, manifest.step, complete.encode())
            return {"num_bytes": complete.num_bytes}

        verdict = _tried(commit, draft)
        if "failure" in verdict:
            shutil.rmtree(draft, ignore_errors=True)
        return verdict

    def _make_room(self, newest: Path, own: Sequence[File], spared: Collection[int]) -> dict[str, str]:
        """Remove older checkpoints, once the ranks have read the newest back from disk.

        Each rank reads its `own` files. Return {"failure": why the newest is not a checkpoint after
        all}, {"litter": why older ones stayed}, or {}.
        """

        def count() -> dict[str, Any]:
            return {"surplus": len(self.folder.surplus(self.keep, spared))}

        counted = self.messages.broadcast(_tried(count, self.folder.path) if self.messages.is_first else None)
        if "failure" in counted:
            return {"litter": counted["failure"]}
        if not counted["surplus"]:
            return {}
        read_back = _tried(lambda: check_files(newest, own, from_disk=True), newest)
        bad = self.messages.first(read_back.get("failure", ""))

        def judge() -> dict[str, Any]:
            if bad:
                self.folder.set_aside(newest, "damaged", bad)
                raise OSError(bad)
            pruned = _tried(lambda: {"gone": self.folder.prune(self.keep, spared)}, self.folder.path)
            return {"litter": pruned["failure"]} if "failure" in pruned else {}

        judged = _tried(judge, self.folder.path) if self.messages.is_first else None
        outcome: dict[str, str] = self.messages.broadcast(judged)
        return outcome


def _tried(attempt: Callable[[], dict[str, Any] | None], about: Path) -> dict[str, Any]:
    """Return what `attempt` returns, or {"failure": why}.

    A write that fails does not say of which file, and `rmtree` says only its last name; then the
    message names `about`.
    """
    try:
        return attempt() or {}
    except OSError as error:
        return {"failure": str(error) if error.errno is None else f"{about / (error.filename or '')}: {error.strerror}"}
    except (DataError, ValueError) as error:
        return {"failure": str(error)}


def _noticing(fragments: Sequence[StateFragment], tensors: Iterable[Tensor], wrong: list[str]) -> Iterator[Tensor]:
    """Yield the tensors, and add the names of those that are not finite to `wrong`."""
    for (fragment, name, _), values in zip(fragments, tensors, strict=True):
        if not is_finite(values):
            state = "" if name == WEIGHT else f" ({name})"
            wrong.append(f"tensor {fragment.piece.name}{state}")
        yield values


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _slots(fragments: Sequence[StateFragment]) -> dict[str, Slot]:
    slots = {key_of(f.fragment, f.state): Slot(DTYPES[f.dtype], (f.fragment.count,)) for f in fragments}
    assert len(slots) == len(fragments), "two fragments of one name"
    return slots


def _write_beside(folder: Path, save_beside: Callable[[Path], None]) -> list[File]:
    """Let others' code write a folder, make its files private and durable, and return them."""
    folder.mkdir(mode=0o700)
    save_beside(folder)
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(FILE_MODE)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            data = file.read()
        files.append(File.of(f"{HUGGING_FACE}/{path.relative_to(folder).as_posix()}", data))
    return files
