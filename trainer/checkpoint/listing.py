"""`triaxis checkpoints`: the checkpoints of a run, and whether they are whole. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.checkpoint.best import Contest
from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.folder import REASON, CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.errors import DataError, RecipeError
from trainer.files.reading import open_regular
from trainer.run_folder import RunFolder
from trainer.track.text import short


@dataclass(frozen=True)
class Entry:
    """A checkpoint, whole or not, or a folder that was set aside. `verdict`: "" if nothing was
    found wrong."""

    path: Path
    manifest: Manifest | None
    verdict: str
    aside: bool = False
    figure: float | None = None  # by which the best is chosen


@dataclass(frozen=True)
class Listing:
    """A list of a run's checkpoints. `verified`: every file was read and hashed, else only the
    manifests. `contest`: how the best is chosen, None without checkpoint.best."""

    entries: list[Entry]
    verified: bool
    contest: Contest | None = None

    @property
    def damaged(self) -> bool:
        return any(entry.verdict for entry in self.entries if not entry.aside)

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        figure = [self.contest.aim.figure] if self.contest else []
        for title in ("checkpoint", *figure, "saved", "size", "files", "layout", "verdict"):
            table.add_column(title, overflow="fold")
        for entry in self.entries:
            good = "intact: every byte" if self.verified else "its manifest is intact"
            compared = [short(entry.figure, 5) + " best" * (entry is self.best)] if self.contest else []
            cells = (entry.path.name, *compared, *_facts(entry.manifest), entry.verdict or good)
            table.add_row(*(Text(cell, style="dim" if entry.aside else "") for cell in cells))
        return table

    @property
    def best(self) -> Entry | None:
        """The best checkpoint that nothing was found wrong with, None if there is none."""
        best: Entry | None = None
        for entry in reversed([entry for entry in self.entries if not entry.verdict]):
            if self.contest and self.contest.aim.improves(entry.figure, best.figure if best else None):
                best = entry
        return best


def survey(run_dir: Path, *, verify: bool) -> Listing:
    """Return the checkpoints, newest first, then what was set aside. RecipeError if there are
    none."""
    folder = _folder(run_dir)
    contest = Contest.of_folder(folder)
    entries = [_look_at(path, contest, verify=verify) for _, path in folder.steps()]
    entries += [_aside(path) for path in folder.set_aside_ones()]
    if not entries:
        raise RecipeError(f"{folder.path}: no checkpoints: give the folder of a run that keeps them (checkpoint.every above 0)")
    return Listing(entries, verify, contest)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` and the best, after verifying the newest. DataError if it is
    not whole."""
    folder = _folder(run_dir)
    for _, path in folder.steps()[:1]:
        manifest = read_sound(path)
        check_files(path, manifest.files, from_disk=True)
    contest = Contest.of_folder(folder)
    best = contest.best(folder) if contest else None
    return folder.prune(keep, spared=[best.step] if best else [])


def _folder(run_dir: Path) -> CheckpointFolder:
    return CheckpointFolder(RunFolder(run_dir).checkpoints)


def _look_at(path: Path, contest: Contest | None, *, verify: bool) -> Entry:
    try:
        manifest = read_sound(path)
        check_files(path, manifest.files if verify else ())
    except DataError as error:
        return Entry(path, None, f"DAMAGED: {error}")
    return Entry(path, manifest, "", figure=contest.figure(manifest) if contest else None)


def _aside(path: Path) -> Entry:
    try:
        with open_regular(path / REASON, follow=False) as file:
            reason = file.read(4096).decode(errors="replace").strip()
    except OSError:
        reason = "no reason was left"
    return Entry(path, None, f"set aside: {reason}", aside=True)


def _facts(manifest: Manifest | None) -> tuple[str, str, str, str]:
    if manifest is None:
        return ("–",) * 4
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time))
    degrees = {key: value for key, value in manifest.layout.items() if key in ("pp", "dp", "cp", "tp") and value > 1}
    layout = "×".join(f"{key}{value}" for key, value in degrees.items()) or "one process"
    return saved, f"{manifest.num_bytes / 1e6:,.1f} MB", str(len(manifest.files)), f"{layout}, ZeRO-{manifest.layout['zero']}"
