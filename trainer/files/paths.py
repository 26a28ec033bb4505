"""Paths as users write them: with ~, and sometimes impossible. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LONGEST_NAME = 255  # bytes of one name, on all of Linux's file systems
LONGEST = 4096 - 256  # bytes of a path: Linux's PATH_MAX, less what is written below a folder


def expanded(name: str) -> str:
    """Return the path with the home folder in place of ~."""
    return os.path.expanduser(name) if name.startswith("~") else name


def as_loaded(name: str | None) -> str | None:
    """Return the absolute path of a folder that is here, so that it is found from any folder; a hub
    name, and None, as it is."""
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name


def wrong_with(name: str) -> str:
    """Return why no file or folder of this machine can have that name, with the remedy; "" if one
    can."""
    if "\0" in name:
        return "has a NUL character, which no path may have: remove it"
    if scheme := SCHEME.match(name):
        remedy = "write the path alone" if scheme[1].lower() == "file" else "mount or copy what is there, and name that"
        return f"is an address ({scheme[0]}), and only paths of this machine are read and written: {remedy}"
    if name.startswith("~") and expanded(name) == name:
        return f"begins with {name.partition('/')[0]}, the home of no user here: write out the path"
    encoded = os.fsencode(expanded(name))
    if len(encoded) > LONGEST or any(len(part) > LONGEST_NAME for part in encoded.split(b"/")):
        return f"is too long: a name has at most {LONGEST_NAME} bytes, a path {LONGEST:,}"
    return ""


def here_sheet(environment: Mapping[str, str]) -> Path:
    """Return the file with the figures of this machine, among this user's settings (XDG).

    `triaxis doctor --measure` writes it, and planning for the device "here" reads it.
    """
    return _settings(environment) / "here.json"


def calibration_file(environment: Mapping[str, str]) -> Path:
    """Return the file with what runs have shown of the plans' times, among this user's settings."""
    return _settings(environment) / "calibration.json"


def _settings(environment: Mapping[str, str]) -> Path:
    home = Path(environment.get("HOME") or "~").expanduser()
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "triaxis"


def occupied(folder: str) -> str:
    """Return the file in the place of the folder, or of one above it; "" if there is none."""
    for path in (Path(folder), *Path(folder).parents):
        if os.path.lexists(path):
            return "" if path.is_dir() else str(path)
    return ""
