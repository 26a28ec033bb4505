"""The proof that a checkpoint is what was written: every byte is read and hashed. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from trainer.checkpoint.folder import STEP, files_in
from trainer.checkpoint.manifest import MANIFEST, File, Manifest
from trainer.errors import DataError
from trainer.files.reading import open_regular

CHUNK_BYTES = 4 << 20


def read_sound(checkpoint: Path) -> Manifest:
    """Return the manifest if it is intact, lists exactly the files in the folder, and is of the
    step in the folder's name.

    DataError says what is wrong.
    """
    manifest = Manifest.read(checkpoint)
    named = STEP.fullmatch(checkpoint.name)
    if named and int(named.group(1)) != manifest.step:
        raise DataError(f"{checkpoint}: its manifest is of step {manifest.step}: put in from elsewhere")
    listed = {file.name for file in manifest.files} | {MANIFEST}
    # A network file system has files of its own.
    present = {name for name in files_in(checkpoint) if not name.startswith(".nfs")}
    if missing := sorted(listed - present):
        raise DataError(f"{checkpoint}/{missing[0]}: missing")
    if extra := sorted(present - listed):
        raise DataError(f"{checkpoint}/{extra[0]}: not of this checkpoint: put in from elsewhere")
    return manifest


def check_files(checkpoint: Path, files: Iterable[File], *, from_disk: bool = False) -> None:
    """Raise DataError that names the first file that is not, to the byte, what the manifest says.

    `from_disk`: let the system first drop what it caches of the files, so that the disk is read.
    """
    for file in files:
        path = checkpoint / file.name
        try:
            with open_regular(path, follow=False) as opened:
                num_bytes = os.fstat(opened.fileno()).st_size
                sha256 = _digest(opened, from_disk=from_disk) if num_bytes == file.num_bytes else ""
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if num_bytes != file.num_bytes:
            raise DataError(f"{path}: damaged ({num_bytes} bytes, {file.num_bytes} were written)")
        if sha256 != file.sha256:
            raise DataError(f"{path}: damaged (its checksum does not match)")


def _digest(file: BinaryIO, *, from_disk: bool) -> str:
    if from_disk and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()
