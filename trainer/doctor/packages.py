"""The check of packages: what is installed, against the versions that Triaxis needs and those that
end a known hole. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, broken, fallback, ready

OURS = "triaxis"
NAMED = ("torch", "deepspeed", "transformers")  # in the line of those that are ready
REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(?:>=\s*([\w.]+))?")


class Advisory(NamedTuple):
    """A hole in versions of a package before `ends`."""

    package: str
    ends: str
    cve: str
    what: str


ADVISORIES = (
    Advisory("torch", "2.6.0", "CVE-2025-32434", "torch.load runs code of the file in spite of weights_only=True"),
    Advisory("torch", "2.10.0", "CVE-2026-24747", "a file read with weights_only=True corrupts memory"),
    Advisory("transformers", "4.53.0", "CVE-2025-6921", "a pattern for weight decay takes for ever (ReDoS)"),
    Advisory("transformers", "5.3.0", "CVE-2026-4372", "a model's config.json runs code in spite of trust_remote_code=False"),
    Advisory("deepspeed", "0.15.1", "CVE-2024-43497", "code from elsewhere can be run"),
    Advisory("jinja2", "3.1.6", "CVE-2025-27516", "a chat template leaves its sandbox through |attr"),
    Advisory("filelock", "3.20.1", "CVE-2025-68146", "a link in place of a lock empties another file"),
    Advisory("pyarrow", "14.0.1", "CVE-2023-47248", "a Parquet or Arrow file runs code"),
)


def check_packages(_: Case) -> Iterator[Finding]:
    """Yield what is missing or too old, and one finding for all that is as it should be."""
    wanted = _wanted()
    if not wanted:
        yield fallback(OURS, "is not installed, so the versions that it needs are not known", "pip install -e .")
    wanted |= {advisory.package: "" for advisory in ADVISORIES if advisory.package not in wanted}
    sound = []
    for package, least in wanted.items():
        version = _installed(package)
        if version is None:
            if least:
                yield broken(
                    f"{package} version", f"is not installed, and Triaxis needs {least} or newer", _pip(package, least)
                )
        elif reasons := list(_reasons(package, version, least)):
            yield broken(
                f"{package} version", f"{version} is too old: {'; '.join(reasons)}", _pip(package, _floor(package, least))
            )
        else:
            sound.append((package, version))
    named = [f"{package} {version}" for package, version in sound if package in NAMED]
    others = len(sound) - len(named)
    yield ready("packages", f"{', '.join(named)} and {others} others are as new as they must be".removeprefix(" and "))


def _wanted() -> dict[str, str]:
    """Return the packages that Triaxis needs, each with its least version; {} if it is not
    installed."""
    try:
        lines = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    matches = [REQUIREMENT.match(line) for line in lines if "extra ==" not in line]
    return {match[1].lower(): match[2] or "" for match in matches if match}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _reasons(package: str, version: str, least: str) -> Iterator[str]:
    if least and parts(version) < parts(least):
        yield f"Triaxis needs {least}"
    for advisory in ADVISORIES:
        if advisory.package == package and parts(version) < parts(advisory.ends):
            yield f"{advisory.cve} before {advisory.ends}: {advisory.what}"


def _floor(package: str, least: str) -> str:
    """Return the least version without a hole that Triaxis works with."""
    versions = [least, *(advisory.ends for advisory in ADVISORIES if advisory.package == package)]
    return max(versions, key=parts)


def parts(version: str) -> tuple[int, ...]:
    """Return the numbers of a release: 2.13.0+cu128 → (2, 13), with zeros at the end left out."""
    release = re.match(r"[\d.]*", version)
    numbers = [int(part) for part in (release[0] if release else "").split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _pip(package: str, least: str) -> str:
    return f'pip install "{package}>={least}"'
