"""What is taken out of texts and values before they are written, and what is left as it is."""

from __future__ import annotations

import logging
import sys

import pytest

from trainer.redaction import REDACTED, RedactedRecord, holds_secret, redact, redact_text


@pytest.fixture(autouse=True)
def no_secret_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_redaction_reaches_keys_urls_and_nothing_else() -> None:
    recipe = {
        "hub": {"hf_token": "hf_x", "api_key": "k", "nested": [{"password": "p"}]},
        "credentials": {"user": "u"},
        "data": {"path": "https://me:pw@host/x?sig=1&access_token=t", "tokenizer": "bpe:4096", "tokens": "many"},
        "model": {"eos_token_id": 2},
    }
    assert redact(recipe) == {
        "hub": {"hf_token": REDACTED, "api_key": REDACTED, "nested": [{"password": REDACTED}]},
        "credentials": {"user": REDACTED},
        "data": {
            "path": f"https://{REDACTED}@host/x?sig=1&access_token={REDACTED}",
            "tokenizer": "bpe:4096",
            "tokens": "many",
        },
        "model": {"eos_token_id": 2},
    }
    assert redact("x", "data.api_key") == REDACTED


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:p@ss@host/a@b", f"https://{REDACTED}@host/a@b"),
        ("s3://key:word@bucket", f"s3://{REDACTED}@bucket"),
        ("'https://h/x?X-Amz-Signature=abc&n=1' is gone", f"'https://h/x?X-Amz-Signature={REDACTED}&n=1' is gone"),
        ("MY_SERVICE_PASSWORD=hunter2, then", f"MY_SERVICE_PASSWORD={REDACTED}, then"),
        ('api_key = "abc"', f'api_key = "{REDACTED}"'),
        ("use hf_" + "a" * 34 + "!", f"use {REDACTED}!"),
        ("AKIA" + "A" * 16, REDACTED),
        ("Bearer eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", f"Bearer {REDACTED}"),
    ],
)
def test_texts_with_a_secret(text: str, left: str) -> None:
    assert redact_text(text) == left
    assert redact_text(left) == left, "a copy of a copy"
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a?page=2",
        "mail me@host, see https://host/@me",
        "tokens/s 12,345; eos_token_id = 2; tokenizer = bpe:4096; max_tokens=5",
        "token = 12",
        "hf_hub and sk-learn, step-00000100",
        "model.layers.0.self_attn.k_proj.weight",
    ],
)
def test_texts_without_one(text: str) -> None:
    assert redact_text(text) == text
    assert not holds_secret(text)


def test_values_of_secret_variables_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_TOKEN", "true")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    assert redact({"a": ["the correct horse is true sometimes"]}) == {"a": [f"the {REDACTED} is true sometimes"]}


def test_a_log_record_is_redacted_after_its_arguments_are_in_it() -> None:
    try:
        raise KeyError("https://me:pw@elsewhere")
    except KeyError:
        failure = sys.exc_info()
    record = RedactedRecord("a", logging.INFO, "f", 1, "from %s://me:%s@host", ("https", "pw"), failure)
    said = logging.Formatter("%(message)s").format(record)
    assert said.startswith(f"from https://{REDACTED}@host\nTraceback")
    assert said.endswith(f"KeyError: 'https://{REDACTED}@elsewhere'")
