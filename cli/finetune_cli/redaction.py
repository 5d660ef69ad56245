"""Recognises text that looks like a secret. Such text is never printed and never written into a FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

REDACTED_TEXT = "***"
TOKEN_PATTERN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"
)
"""Patterns of tokens. Without the minimum lengths, names of models, columns and folders would match."""
SECRET_NAME_PATTERN = re.compile(r"(token|secret|passw|api_?key|credential|_key\b|-key\b|_uri\b)", re.IGNORECASE)
"""Pattern for names of options and variables that usually hold secrets."""
USERINFO_PATTERN = re.compile(r"(?<=://)[^/@\s]+@")
SECRET_QUERY_PATTERN = re.compile(r"(?<=[?&])((?:[a-z]+[-_])*(?:token|key|secret|password|sig|signature)=)[^&\s'\"]+", re.IGNORECASE)


def redact_text(text: str, replacement: str = REDACTED_TEXT) -> str:
    """Replace every part of a text that looks like a secret by `mark`."""
    return SECRET_QUERY_PATTERN.sub(rf"\1{replacement}", USERINFO_PATTERN.sub(f"{replacement}@", TOKEN_PATTERN.sub(replacement, text)))


def contains_secret(value: Any) -> bool:
    """Return whether a string, or any string inside a list or mapping, looks like a secret."""
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
