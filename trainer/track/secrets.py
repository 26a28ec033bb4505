"""What leaves the machine with a recipe (W&B, a report that is mailed) leaves without its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

# Whole words of a key: "hf_token" is secret, "tokenizer" and "tokens_per_s" are not.
_SECRET_KEY = re.compile(
    r"(?:^|[_.\-])(?:token|secret|password|passwd|passphrase|api[_\-]?key|access[_\-]?key|private[_\-]?key|credentials?)(?:$|[_.\-])",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.IGNORECASE)
_SECRET_QUERY = re.compile(r"(?P<name>[?&][^=&\s]*(?:token|secret|password|signature|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(value: Any, key: str = "") -> Any:
    """A copy without the texts under secret-looking keys, the `user:password@` of URLs and secret URL parameters.

    Numbers are never secrets: `eos_token_id: 2` stays.
    """
    if isinstance(value, Mapping):
        return {name: redact(item, name if not _is_secret(key) else key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _is_secret(key):
        return REDACTED
    return _SECRET_QUERY.sub(rf"\g<name>{REDACTED}", _USERINFO.sub(rf"\g<scheme>{REDACTED}@", value))


def _is_secret(key: str) -> bool:
    return bool(_SECRET_KEY.search(key))
