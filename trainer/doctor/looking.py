"""The start of the process that imports torch and DeepSpeed, and the reading of what it tells. No
torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

PATIENCE_S = 60.0  # from a cold network file system torch takes most of a minute
PROBE = "trainer.doctor.probe"
Facts = dict[str, Any]


def start_looking(environment: Mapping[str, str]) -> Callable[[], dict[str, Facts]]:
    """Start the process. Return a function that waits for it, and returns its facts by part.

    A part with which it ended, or in which it stayed, has an "error" that says so; parts after it
    are missing.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", PROBE, "look"],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    known: dict[str, Facts] = {}

    def looked() -> dict[str, Facts]:
        if not known:
            known.update(_facts(process))
        return known

    return looked


def _facts(process: subprocess.Popen[str]) -> dict[str, Facts]:
    try:
        answers, noise = process.communicate(timeout=PATIENCE_S)
        ended = _how(process.returncode, noise)
    except subprocess.TimeoutExpired:
        process.kill()
        answers, _ = process.communicate()
        ended = f"did not end in {PATIENCE_S:.0f} s"
    parts: dict[str, Facts] = {}
    for line in answers.splitlines():
        facts = json.loads(line)
        parts[facts["part"]] = facts
    for facts in parts.values():
        if facts.get("begun"):
            facts["error"] = ended
    return parts or {"torch": {"error": ended}}


def _how(code: int, noise: str) -> str:
    """Return how a process ended, with its last words."""
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    if code < 0:
        return f"ended the process by {signal.Signals(-code).name}{last}"
    return f"ended the process with exit code {code}{last}"
