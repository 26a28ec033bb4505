"""The checks, a row each, and how they are run. No torch.

To add a check, write a function that yields findings, and give it a row. Those that wait for the
process which imports torch come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from shlex import quote

from trainer.doctor.accelerators import check_accelerators, check_backends, check_torch
from trainer.doctor.case import Case, Check
from trainer.doctor.findings import Finding, broken
from trainer.doctor.folders import check_clock, check_folders
from trainer.doctor.launchers import check_launcher, check_network
from trainer.doctor.limits import check_host, check_limits, check_locale, check_shared_memory
from trainer.doctor.ops import check_deepspeed, check_locks
from trainer.doctor.packages import check_packages
from trainer.doctor.recipe_needs import check_hub, check_recipe, check_wandb
from trainer.doctor.toolchain import check_compiler, check_cuda_home, check_libaio, check_ninja

CHECKS: tuple[Check, ...] = (
    check_packages,
    check_folders,
    check_clock,
    check_host,
    check_locale,
    check_limits,
    check_recipe,
    check_wandb,
    check_hub,
    check_libaio,
    check_torch,
    check_accelerators,
    check_backends,
    check_network,
    check_launcher,
    check_shared_memory,
    check_compiler,
    check_ninja,
    check_cuda_home,
    check_deepspeed,
    check_locks,
)


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return all findings, what stops a run first, the others by how much they matter."""
    findings = [_for(case, finding) for check in checks for finding in _found(check, case)]
    return sorted(findings, key=lambda finding: finding.rank)


def _found(check: Check, case: Case) -> list[Finding]:
    """Return a check's findings. A machine that breaks the check itself is a finding too."""
    try:
        return list(check(case))
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return [broken(name, f"could not be looked at: {type(error).__name__}: {error}", "", needed=False)]


def _for(case: Case, finding: Finding) -> Finding:
    """Return the finding with the recipe's name in its command, which can then be copied."""
    return finding if case.file is None else replace(finding, fix=finding.fix.replace("RECIPE", quote(str(case.file))))
