"""Recognises text that looks like a secret. Such text is never printed and never written into a FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_api.redaction import redact_tokens

REDACTED_TEXT = "***"
SECRET_NAME_PATTERN = re.compile(r"(token|secret|passw|api_?key|credential|_key\b|-key\b|_uri\b)", re.IGNORECASE)
"""Pattern for names of options and variables that usually hold secrets."""
USERINFO_PATTERN = re.compile(r"(?<=://)[^/@\s]+@")


def redact_text(text: str, replacement: str = REDACTED_TEXT) -> str:
    """Replace every part of a text that looks like a secret by `replacement`."""
    return redact_tokens(USERINFO_PATTERN.sub(f"{replacement}@", text), replacement)


def contains_secret(value: Any) -> bool:
    """Whether a string, or any string inside a list or mapping, looks like a secret."""
    return any(redact_text(text) != text for text in _iterate_strings(value))


def _iterate_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _iterate_strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iterate_strings(item)
