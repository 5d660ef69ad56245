"""Redaction recognises secrets by their form, at any position in a text, and does not change ordinary text."""

from __future__ import annotations

import logging
import re
import time

import pytest
from finetune_api.redaction import ASSIGNMENT_PATTERN, TOKEN_PATTERNS, RedactingFormatter, redact_all, redact_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

WORD = st.text("ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0123456789", min_size=24, max_size=60)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
BASE64URL = st.text("ABCDEFabcdef0123456789_-", min_size=24, max_size=60)


def make_pem(label: str, body: str) -> str:
    """Return a PEM block with this label."""
    return f"-----BEGIN {label}-----\n{body}\n{body}\n-----END {label}-----"


def make_token_strategy(template: str, alphabet: str, length: int) -> st.SearchStrategy[tuple[str, str]]:
    """Return a strategy that draws a pair (text, secret). The secret is random and has this length. The text is the template with the secret in place of `{}`.
    """
    return st.text(alphabet, min_size=length, max_size=length).map(lambda secret: (template.format(secret), secret))


LETTERS_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CAPITALS_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SECRETS: dict[str, st.SearchStrategy[tuple[str, str]]] = {
    "AWS key": make_token_strategy("AKIA{}", CAPITALS_AND_DIGITS, 16),
    "AWS temporary key": make_token_strategy("ASIA{}", CAPITALS_AND_DIGITS, 16),
    "Hugging Face": make_token_strategy("hf_{}", LETTERS_AND_DIGITS, 34),
    "OpenAI": make_token_strategy("sk-1{}", LETTERS_AND_DIGITS, 47),
    "OpenAI project": make_token_strategy("sk-proj-0{}", LETTERS_AND_DIGITS + "_-", 120),
    "Anthropic": make_token_strategy("sk-ant-api03-{}", LETTERS_AND_DIGITS + "_-", 95),
    **{f"GitHub {kind}": make_token_strategy(f"{kind}_{{}}", LETTERS_AND_DIGITS, 36) for kind in ("ghp", "gho", "ghu", "ghs", "ghr")},
    "GitHub fine-grained": make_token_strategy("github_pat_{}", LETTERS_AND_DIGITS + "_", 82),
    "GitLab": make_token_strategy("glpat-{}", LETTERS_AND_DIGITS + "_-", 20),
    "Slack": make_token_strategy("xoxb-{}", "0123456789-" + LETTERS_AND_DIGITS, 50),
    "Slack webhook": make_token_strategy("https://hooks.slack.com/services/T0A/B0B/{}", LETTERS_AND_DIGITS, 24),
    "Google": make_token_strategy("AIza{}", LETTERS_AND_DIGITS + "_-", 35),
    "Stripe": make_token_strategy("sk_live_{}", LETTERS_AND_DIGITS, 24),
    "npm": make_token_strategy("npm_{}", LETTERS_AND_DIGITS, 36),
    "PyPI": make_token_strategy("pypi-AgEIcHlwaS5vcmc{}", LETTERS_AND_DIGITS + "_-", 60),
    "Docker": make_token_strategy("dckr_pat_{}", LETTERS_AND_DIGITS + "_-", 27),
    "NVIDIA": make_token_strategy("nvapi-{}", LETTERS_AND_DIGITS + "_-", 64),
    "Databricks": make_token_strategy("dapi{}", "0123456789abcdef", 32),
    "DigitalOcean": make_token_strategy("dop_v1_{}", "0123456789abcdef", 64),
    "Vault": make_token_strategy("hvs.{}", LETTERS_AND_DIGITS + "_-", 90),
    "SendGrid": st.tuples(WORD, WORD).map(lambda parts: (f"SG.{parts[0]}.{parts[1]}", parts[1])),
    "Groq": make_token_strategy("gsk_{}", LETTERS_AND_DIGITS, 52),
    "JWT": st.tuples(BASE64URL, BASE64URL, BASE64URL).map(lambda p: (f"eyJ{p[0]}.eyJ{p[1]}.{p[2]}", p[2])),
    "Bearer": BASE64URL.map(lambda part: (f"Authorization: Bearer {part}", part)),
    "Basic": WORD.map(lambda part: (f"Authorization: Basic {part}==", part)),
    "Basic in JSON": WORD.map(lambda part: (f'{{"authorization": "Basic {part}"}}', part)),
    "Token header": WORD.map(lambda part: (f"authorization: token {part}", part)),
    "password in a URL": WORD.map(lambda part: (f"mongodb://user:{part}@host/db", part)),
    "AWS presigned": HEX.map(lambda part: (f"https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={part}", part)),
    "AWS presigned credential": WORD.map(lambda part: (f"https://b/k?X-Amz-Credential={part}%2F20260101&X-Amz-Expires=1", part)),
    "AWS security token": WORD.map(lambda part: (f"https://b/k?a=1&X-Amz-Security-Token={part}", part)),
    "AWS presigned, version 2": WORD.map(lambda part: (f"https://b/k?AWSAccessKeyId=A&Signature={part}%3D&Expires=1", part)),
    "Google presigned": HEX.map(lambda part: (f"https://storage.googleapis.com/b/k?X-Goog-Signature={part}", part)),
    "Azure SAS": WORD.map(lambda part: (f"https://a.blob.core.windows.net/c?sv=1&sig={part}%3D&se=2", part)),
    "presigned in a query": HEX.map(lambda part: (f"https://h/?next=https%3A%2F%2Fb%2Fk%3FX-Amz-Signature%3D{part}", part)),
    "presigned in HTML": HEX.map(lambda part: (f'<a href="https://b/k?a=1&amp;X-Amz-Signature={part}">', part)),
    **{
        f"PEM {kind}": WORD.map(lambda part, kind=kind: (make_pem(kind, part), part))
        for kind in ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "PGP PRIVATE KEY BLOCK")
    },
    "PEM in JSON": WORD.map(lambda part: ('{"private": "' + make_pem("PRIVATE KEY", part).replace("\n", "\\n") + '"}', part)),
    "PEM without end": WORD.map(lambda part: (f"-----BEGIN PRIVATE KEY-----\n{part}\n{part}", part)),
}  # fmt: skip
NAMES_OF_SECRETS = ("password", "AWS_SECRET_ACCESS_KEY", "client_secret", "api-key", "AccountKey", "Set-Cookie", "private_key", "TOKEN")
TEXT_BEFORE = st.sampled_from(["", " ", "\n", '"', "'", "(", "=", ": ", "error: ", "https://x/ ", "\\n", "[", ",", "%3D", "[31m"])
TEXT_AFTER = st.sampled_from(["", " ", "\n", '"', "'", ")", ",", ".", "; x", " and more", "]"])


@pytest.mark.parametrize("kind", SECRETS)
@settings(max_examples=30)
@given(data=st.data())
def test_every_kind_of_secret_is_replaced_wherever_it_is(kind: str, data: st.DataObject) -> None:
    text, secret = data.draw(SECRETS[kind])
    text_before, text_after = data.draw(TEXT_BEFORE), data.draw(TEXT_AFTER)
    for redact in (redact_tokens, redact_all):
        redacted_text = redact(f"{text_before}{text}{text_after}", "***")
        assert secret not in redacted_text and "***" in redacted_text


@pytest.mark.parametrize("name", NAMES_OF_SECRETS)
@settings(max_examples=30)
@given(value=WORD, separator=st.sampled_from(["=", ": ", '": "', " = ", "':'"]))
def test_a_value_after_the_name_of_a_secret_is_replaced(name: str, value: str, separator: str) -> None:
    assert redact_all(f"x {name}{separator}{value} y", "***") == f"x {name}{separator}*** y"


@pytest.mark.parametrize(
    "text",
    [
        "", "hf_model.env", "hf-internal-testing/tiny", "org/sk-learn-classification-model", "s3://bucket/a@b", "maxTokens = 500 and tokenizer: fine",
        "Basic understanding of transformers", "the Bearer of news", "step 400 loss 1.25", "sha256:" + "ab" * 32, "ab" * 20, "docker://image:5000/x@sha256:1",
        "https://host/path?page=2&sort=name", "a1-1f3c9a2b", "oci://registry:5000/org/image", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "11111111-2222-3333-4444-555555555555", "hf://org/name@0123456789abcdef0123456789abcdef01234567", "skip_special_tokens",
    ],
)  # fmt: skip
def test_ordinary_text_is_not_changed(text: str) -> None:
    assert redact_all(text, "***") == text


@given(text=st.text(max_size=300))
def test_redacting_a_redacted_text_changes_nothing(text: str) -> None:
    redacted_text = redact_tokens(text, "***")
    assert redact_tokens(redacted_text, "***") == redacted_text


def test_no_pattern_repeats_a_group() -> None:
    """When a pattern repeated a group, a search in 4 KiB of `a_a_a_...` took 0.7 seconds. A pod that reported such a text could block the operator's event
    loop.
    """
    for pattern in (*TOKEN_PATTERNS, ASSIGNMENT_PATTERN):
        assert not re.search(r"\)[*+]", pattern.pattern)


SLOW_TEXTS = [
    "a_", "sk-", "sk-a", "eyJa", "eyJaaaaaaaaaa.", "://a:", "?key", "?a-", "&", "Basic a", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "Bearer ",
    "authorization: ", "authorization:basic ", "%26", "%26token%3D%2F", "token=", "secret_", "SG.a", "1", "://", "password: ", "hooks.slack.com/",
]  # fmt: skip


@pytest.mark.parametrize("repeated_text", SLOW_TEXTS)
def test_the_time_of_redaction_grows_only_linearly(repeated_text: str) -> None:
    """If a text is 8 times as long, a linear pattern takes 8 times as long, and a quadratic pattern 64 times as long. CPU time is measured, because other
    programs do not affect it.
    """

    def measure_seconds(length: int) -> float:
        text, fastest_seconds = (repeated_text * length)[:length], float("inf")
        for _ in range(3):
            started_at = time.process_time()
            redact_all(text, "***")
            fastest_seconds = min(fastest_seconds, time.process_time() - started_at)
        return fastest_seconds

    assert measure_seconds(64_000) < 32 * max(measure_seconds(8_000), 0.001)


def test_log_lines_and_tracebacks_contain_no_secrets() -> None:
    github_token = "ghp_" + "a1" * 18
    try:
        raise ValueError(f"cannot clone with {github_token}")
    except ValueError as error:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "failed: %s", (f"https://u:{'p4' * 8}@h/x",), (type(error), error, error.__traceback__))
    text = RedactingFormatter("%(message)s").format(record)
    assert github_token not in text and "p4p4" not in text
    assert text.startswith("failed: https://[redacted]@h/x\nTraceback") and "cannot clone with [redacted]" in text
