"""Redaction in `finetune support-bundle`."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_cli.commands.support_bundle import redact_for_others, redact_value


@pytest.mark.parametrize(
    ("value", "redacted_value"),
    [
        ({"name": "HF_TOKEN", "value": "abc"}, {"name": "HF_TOKEN", "value": "REDACTED"}),
        ({"name": "X", "value": "abc"}, {"name": "X", "value": "abc"}),
        ({"password": "abc"}, {"password": "REDACTED"}),
        ({"tokenSecretRef": {"name": "hub", "key": "token"}}, {"tokenSecretRef": {"name": "hub", "key": "token"}}),
        ({"a": ["https://u:p@host/x", "hf_abcdefgh"]}, {"a": ["https://REDACTED@host/x", "REDACTED"]}),
        (
            {"last-applied": '{"env": [{"name": "MY_TOKEN", "value": "x"}], "b": "\u00e9"}'},
            {"last-applied": '{"env": [{"name": "MY_TOKEN", "value": "REDACTED"}], "b": "\u00e9"}'},
        ),
        ({"api_key": '{"a": 1}'}, {"api_key": "REDACTED"}),
        ({"a": "{not json hf_abcdefgh"}, {"a": "{not json REDACTED"}),
    ],
)
def test_values_named_like_secrets_are_redacted(value: Any, redacted_value: Any) -> None:
    assert redact_value(value) == redacted_value


@pytest.mark.parametrize(
    "secret", ["ghp_" + "a1" * 12, "glpat-" + "b2" * 10, "https://onlytoken@git.example", "https://x/y?token=abc123"]
)
def test_every_secret_that_messages_redact_is_redacted(secret: str) -> None:
    redacted_text = redact_for_others(f"cloning {secret} now")
    assert (secret in redacted_text, redacted_text.startswith("cloning ")) == (False, True)
