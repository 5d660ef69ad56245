"""Removes secrets from the texts of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_api.redaction import redact_tokens
from finetune_api.sources import redact_source

HIDDEN_TEXT = "(hidden)"
SECRET_NAME_PATTERN = re.compile(r"(token|secret|passw|api_?key|access_?key|credential|_key$|_uri$)", re.IGNORECASE)
"""Names of environment variables that usually hold secrets."""
MIN_SECRET_LENGTH = 6
"""Shortest value of a variable that is hidden, in characters. Shorter values are not hidden, because they also occur in ordinary texts."""
_URL_CREDENTIALS_PATTERN = re.compile(r"(?<=://)[^/@\s]+@")


def redact_text(text: str) -> str:
    """Return a text without tokens, and without the user, password and signature of a URL."""
    return redact_tokens(_URL_CREDENTIALS_PATTERN.sub("", redact_source(text)), HIDDEN_TEXT)


def list_secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables whose names suggest a secret, longest first."""
    values = {value.strip() for name, value in environment.items() if SECRET_NAME_PATTERN.search(name)}
    return sorted((value for value in values if len(value) >= MIN_SECRET_LENGTH), key=len, reverse=True)


def hide_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return the text with `HIDDEN_TEXT` in place of every secret."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN_TEXT)
    return text


def flatten_values(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Return pairs of the dotted path and the text of each value in nested objects.

    Secrets and the values of environment variables are replaced by `HIDDEN_TEXT`.
    """
    if isinstance(value, dict) and value:
        if path.endswith("env[]") and "value" in value:
            value = {**value, "value": HIDDEN_TEXT}
        return [row for name, child in value.items() for row in flatten_values(child, f"{path}.{name}" if path else str(name))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [row for item in value for row in flatten_values(item, f"{path}[]")]
    if isinstance(value, list):
        return [(path, ", ".join(_format_scalar(item) for item in value) or "(empty)")]
    return [(path, _format_scalar(value))] if value != {} else []


def _format_scalar(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.10g}" if isinstance(value, float) else redact_text(str(value))
