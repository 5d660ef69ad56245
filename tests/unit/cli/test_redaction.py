"""Recognising and redacting text that looks like a secret."""

from __future__ import annotations

from finetune_cli.redaction import contains_secret, redact_text

TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"


def test_secrets_are_recognised_and_redacted() -> None:
    for text in (
        TOKEN,
        "s3://a:b@host",
        {"a": [TOKEN]},
        "https://h/x?X-Amz-Signature=0a",
        "sk-" + "proj1" * 6,
        "ghp_" + "a" * 36,
    ):
        assert contains_secret(text)
    for text in (
        "hf_model.env",
        "hf-internal-testing/tiny",
        "org/sk-learn-classification-model",
        "s3://bucket/a@b",
        3,
        None,
    ):
        assert not contains_secret(text)
    assert redact_text(f"a {TOKEN} b https://u:p@h/?token=x&y=1") == "a *** b https://***@h/?token=***&y=1"
