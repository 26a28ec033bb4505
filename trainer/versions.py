"""The versions of this package and of those that a result depends on, as they are installed.
Nothing of them is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("triaxis", "torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Return {package: version}; "" for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that was not installed, or one package alone
        return ""
