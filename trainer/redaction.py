"""The removal of secrets from everything that the program writes or says: a file, a line, a mirror.
No torch.

A recipe may hold a secret: in a URL, under a key that says so, as a token of a known form. The
environment holds others, which a library's message may repeat. All of them become "[redacted]" in
every copy; what the program works with stays whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # a shorter value of a variable may occur in other texts by chance

_NAMES = r"(?:token|secret|password|passwd|passphrase|api[_\-]?key|access[_\-]?key|private[_\-]?key|credentials?)"
# Whole words of a key: "hf_token" is secret, "tokenizer" and "tokens_per_s" are not.
_SECRET_KEY = re.compile(rf"(?:^|[_.\-]){_NAMES}(?:$|[_.\-])", re.IGNORECASE)
# Up to the last @ before the path: a password may hold one.
_USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.\-]*://)[^/\s?#\"'<>]+@", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"(?P<name>[?&][^=&\s]*(?:token|secret|password|signature|key)[^=&\s]*=)[^&;\s\"'<>]+", re.IGNORECASE
)
# In running text, such as `MY_SERVICE_PASSWORD=…`.
_ASSIGNED = re.compile(rf"(?P<name>\b(?:[\w.]*[_.\-])?{_NAMES}\s*=\s*[\"']?)(?!\d+\b)[^\s\"'&,;]+", re.IGNORECASE)
# The forms of Hugging Face, GitHub, GitLab, OpenAI and others, Slack, AWS, Google, W&B, JSON Web
# Tokens.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w\-]{20,}|sk-[\w\-]{20,}"
    r"|xox[abprs]-[\w\-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w\-]{35}|wandb_v\d_\w{20,}|eyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]{8,})"
)


def redact(value: Any, key: str = "") -> Any:
    """Return a copy without the texts under secret-looking keys, and with `redact_text` applied to
    all others.

    Numbers are never secrets: `eos_token_id: 2` stays.
    """
    return _redact(value, key, _of_environment())


def redact_text(text: str) -> str:
    """Return the text without secrets.

    These are the `user:password@` of URLs, secret URL parameters and assignments, tokens of known
    forms, and the values of this process's own secret variables.
    """
    return _redact_text(text, _of_environment())


def holds_secret(value: str, key: str = "") -> bool:
    """Return whether something would be removed."""
    return bool(redact(value, key) != value)


def _redact(value: Any, key: str, known: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {name: _redact(item, name if not is_secret_name(key) else key, known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, key, known) for item in value]
    if not isinstance(value, str):
        return value
    return REDACTED if is_secret_name(key) else _redact_text(value, known)


def _redact_text(text: str, known: tuple[str, ...]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    text = _USERINFO.sub(rf"\g<scheme>{REDACTED}@", text)
    text = _SECRET_QUERY.sub(rf"\g<name>{REDACTED}", text)
    text = _ASSIGNED.sub(rf"\g<name>{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def is_secret_name(name: str) -> bool:
    return bool(_SECRET_KEY.search(name))


def _of_environment() -> tuple[str, ...]:
    """Return the secret values of the environment, the longest first, because one may be part of
    another."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST_SECRET and is_secret_name(name)}
    return tuple(sorted(values, key=len, reverse=True))


class RedactedRecord(logging.LogRecord):
    """A log record whose message and traceback are redacted, whoever logs it and wherever it
    goes."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = redact_text("".join(traceback.format_exception(*self.exc_info)).rstrip())

    def getMessage(self) -> str:
        return redact_text(super().getMessage())


def printable(key: str) -> str:
    """Return a key as it is, or quoted if it could be taken for something else, or control a
    terminal."""
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)


def shown(value: Any) -> str:
    """Return a value as JSON, without secrets, cut to fit in a line."""
    text = json.dumps(redact(value))
    return text if len(text) <= 60 else text[:57] + "..."
