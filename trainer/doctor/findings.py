"""The findings of a check: what was seen, how well that works, and one command that helps. No
torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from trainer.errors import printable
from trainer.redaction import redact_text


class State(Enum):
    """The state of a thing; in this order findings are shown."""

    BROKEN = "broken"
    FALLBACK = "fallback"
    ABSENT = "absent"
    READY = "ready"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A thing that a check has looked at.

    | field | meaning |
    |---|---|
    | `name` | the thing, in a word or two |
    | `state` | broken; fallback: it works in another way, slower or less safely; absent: not here, and not asked for; ready |
    | `seen` | what was seen, and what follows from it |
    | `fix` | one command; "" where there is nothing to do |
    | `needed` | whether a run here, or the recipe that was given, cannot do without it |
    """

    name: str
    state: State
    seen: str
    fix: str = ""
    needed: bool = False

    def __post_init__(self) -> None:
        # A variable or a compiler's line may hold a secret, or drive the terminal.
        object.__setattr__(self, "seen", printable(redact_text(" ".join(self.seen.split()))))
        object.__setattr__(self, "fix", printable(redact_text(self.fix)))

    @property
    def stops(self) -> bool:
        """Return whether training would fail because of it."""
        return self.state is State.BROKEN and self.needed

    @property
    def rank(self) -> tuple[int, bool]:
        """The place among all findings: what stops a run comes first."""
        return list(State).index(self.state), not self.needed

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "state": self.state.value}


def ready(name: str, seen: str) -> Finding:
    return Finding(name=name, state=State.READY, seen=seen)


def fallback(name: str, seen: str, fix: str = "") -> Finding:
    return Finding(name=name, state=State.FALLBACK, seen=seen, fix=fix)


def absent(name: str, seen: str, fix: str = "") -> Finding:
    return Finding(name=name, state=State.ABSENT, seen=seen, fix=fix)


def broken(name: str, seen: str, fix: str, *, needed: bool = True) -> Finding:
    return Finding(name=name, state=State.BROKEN, seen=seen, fix=fix, needed=needed)


def install(*, debian: str, fedora: str, conda: str) -> str:
    """Return the command that installs a package of the system here; conda's where this user may
    not."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    if not sudo or shutil.which("sudo"):
        if shutil.which("apt-get"):
            return f"{sudo}apt-get install -y {debian}"
        if manager := next(filter(shutil.which, ("dnf", "yum")), None):
            return f"{sudo}{manager} install -y {fedora}"
    return f"conda install -y -c conda-forge {conda}"
