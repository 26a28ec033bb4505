"""The check of what one recipe needs beyond what every run needs. No torch."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from trainer.cluster.preflight import remarks
from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, broken, fallback, ready
from trainer.files.paths import expanded
from trainer.recipe import looks_local

WANDB = "https://api.wandb.ai"


def check_recipe(case: Case) -> Iterator[Finding]:
    """Yield what the recipe needs before it starts, and what its owner may want to know."""
    if case.recipe is None:
        return
    for line in remarks(case.recipe, case.network, case.run_dir):
        yield fallback("recipe", line, _against(line))


def _against(line: str) -> str:
    """Return the command that the remark speaks of."""
    return "triaxis data prepare RECIPE" if "data prepare" in line else "df -h ."


def check_wandb(case: Case) -> Iterator[Finding]:
    """Yield whether the mirror on Weights & Biases will be accepted, without asking its server."""
    if case.recipe is None or case.recipe.tracking.wandb.mode == "disabled":
        return
    if find_spec("wandb") is None:
        yield fallback("wandb", "is not installed: the run goes on without this mirror", "pip install wandb")
        return
    mode = case.environment.get("WANDB_MODE") or case.recipe.tracking.wandb.mode
    if mode != "online":
        yield ready("wandb", f"{mode}: no login is needed")
    elif case.environment.get("WANDB_API_KEY"):
        yield ready("wandb", "online, with the key in WANDB_API_KEY")
    elif (host := urlsplit(case.environment.get("WANDB_BASE_URL") or WANDB).hostname) and _has_login(case, host):
        yield ready("wandb", f"online, with a login for {host}")
    else:
        yield fallback(
            "wandb", f"online, but nobody is logged in at {host}: the run goes on without this mirror", "wandb login"
        )


def _has_login(case: Case, host: str) -> bool:
    path = expanded(case.environment.get("NETRC") or str(case.home / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_hub(case: Case) -> Iterator[Finding]:
    """Yield names of models on the hub that can neither be fetched nor found in its cache."""
    if case.recipe is None:
        return
    name = case.recipe.model.from_pretrained
    offline = [
        variable
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if case.environment.get(variable, "0") not in ("", "0")
    ]
    if not name or looks_local(name) or os.path.isdir(expanded(name)):
        return
    cached = _hub_cache(case) / f"models--{name.replace('/', '--')}"
    if cached.is_dir():
        yield ready("model", f"{name} is in {cached.parent}")
    elif offline:
        yield broken("model", f"{name} is not in {cached.parent}, and {offline[0]} forbids to fetch it", f"unset {offline[0]}")
    else:
        yield fallback("model", f"{name} is not in {cached.parent} yet: the job fetches it", f"hf download {name}")


def _hub_cache(case: Case) -> Path:
    if named := case.environment.get("HF_HUB_CACHE"):
        return Path(named)
    home = case.environment.get("HF_HOME") or str(case.cache / "huggingface")
    return Path(home) / "hub"
