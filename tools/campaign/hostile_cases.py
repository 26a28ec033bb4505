"""The material of `hostile`, by kind: each function draws a command, the files it finds, and the
limits it runs under."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.campaign.cases import WAYS, arguments, write_recipe
from tools.campaign.damage import flipped, lengthened, truncated, zeroed
from tools.campaign.ranks import run_ranks, train

Random = random.Random
ODD_NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, -1, 0.5, 1e-300, 1e300, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30, 1.0, -0.0)
ODD_TEXTS = (
    *(
        "",
        " ",
        "x",
        "-",
        "--help",
        "~",
        "~/x",
        "~nobody-of-that-name/x",
        "..",
        "s3://bucket/x",
        "file:///tmp",
        "a\0b",
        "\x1b[31m",
        "é" * 200,
    ),
    *(
        "a" * 300,
        "/dev/null/x",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "{{7*7}}",
        "$(id)",
        "%s%s%n",
        "null",
        "1٣",
        "\u202e",
    ),
)
ODD_VALUES: tuple[Any, ...] = (None, True, [], {}, [[]], [None], {"": 1}, *ODD_NUMBERS, *ODD_TEXTS)


@dataclass
class Case:
    """A hostile case.

    `command`: of triaxis, which runs in `folder` on `ranks` processes. `environment`: variables to
    set, or to remove (None). `limits`: names of RLIMIT_*. `outputs`: where stdout and stderr go
    instead of a file. `signals`: (after so many seconds, which). `what`: in words.
    """

    what: str
    command: list[str]
    folder: Path
    ranks: int = 1
    environment: dict[str, str | None] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    signals: tuple[tuple[float, int], ...] = ()
    in_a_folder_that_is_gone: bool = False
    is_alone: bool = False  # in a process of its own, because limits and outputs would be ours too
    disk: tuple[Path, int] | None = None  # a folder that is a disk, and its size [KiB]

    @property
    def starts(self) -> bool:
        """Return whether a run is really started."""
        return self.command[0] in ("train", "eval", "export", "generate") or self.command[:2] == ["data", "prepare"]


@dataclass(frozen=True)
class Originals:
    """The files that are copied and then spoilt: `recipe`, of a run of three steps in `run`, and
    files of data by name."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Originals:
        """Make the files. RuntimeError if the undisturbed run fails."""
        recipe = write_recipe(
            folder,
            steps=3,
            every=1,
            keep=2,
            hidden=16,
            train={"eval_every": 2},
            schedule={"warmup_steps": 0},
            data=_evaluated(folder),
        )
        ended = run_ranks(train, arguments(recipe, folder / "run", WAYS[0]), world_size=1, log=folder / "log")
        if any(ended.codes):
            raise RuntimeError(ended.said)
        return cls(folder)

    @property
    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "recipe.json").read_text())
        return found


def _evaluated(folder: Path) -> dict[str, Any]:
    return {"eval_fraction": 0.1, "sources": [{"path": str(folder / "text.txt")}]}


Draw = Callable[[Random, Originals, Path], Case]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = put(changed[path[0]], path[1:], new)
    return changed


def spoilt(stream: Random, value: Any) -> Any:
    """Return a JSON value with one to three parts of it replaced."""
    for _ in range(stream.choice([1, 1, 1, 2, 3])):
        place = stream.choice([path for path in places(value) if path] or [()])
        value = put(value, place, stream.choice(ODD_VALUES))
    return value


def spoilt_text(stream: Random, text: bytes) -> bytes:
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: flipped(stream, text),
        lambda: truncated(stream, text),
        lambda: lengthened(stream, text),
        lambda: zeroed(stream, text),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode(errors="replace").encode("utf-16"),
        lambda: b"[" * stream.choice([40, 3000, 100_000]),
        lambda: b'{"a":' * 3000,
        lambda: stream.randbytes(stream.choice([0, 1, 100])),
        lambda: text.replace(b"1", "1\u0663".encode()),
        lambda: text.replace(b":", b"::", 1),
        lambda: b"1" * 5000,
    )
    return stream.choice(ways)()
