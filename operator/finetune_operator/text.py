"""Makes text from users and other programs safe to show. Masks secrets, removes control characters and limits the length."""

from __future__ import annotations

import re

MAX_MESSAGE_CHARACTERS = 1024
"""Maximum length of a message in the status, in characters. The size of etcd is limited, and all objects of a cluster share it."""
REDACTED_TEXT = "[redacted]"

SECRET_PATTERNS = (
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"(?<![A-Za-z])(secret[_-]?(?:access[_-]?)?key|secret|token|password|passwd|api[_-]?key)"
        r"([\"']?\s*[=:]\s*[\"']?)([^\s\"',;]{4,})",
        re.IGNORECASE,
    ),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)
"""Patterns for secrets in text. No pattern repeats a group, so the matching time grows only linearly with the length of the text."""


def clean(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Mask secrets and cut the text to `limit` characters. All users who may read the FineTuneJob can see the result."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text[: limit * 4]).strip()
    for pattern in SECRET_PATTERNS:
        text = pattern.sub(_mask_secret, text)
    return text if len(text) <= limit else text[: limit - 4].rstrip() + " ..."


def _mask_secret(match: re.Match[str]) -> str:
    if match.lastindex == 3:
        return f"{match.group(1)}{match.group(2)}{REDACTED_TEXT}"
    return REDACTED_TEXT


def format_duration(seconds: float) -> str:
    """Format a time span: `45s`, `12m`, `1h12m`, `3d4h`."""
    whole_seconds = max(0, round(seconds))
    if whole_seconds < 60:
        return f"{whole_seconds}s"
    minutes = whole_seconds // 60
    if minutes < 60:
        remaining_seconds = whole_seconds % 60
        return f"{minutes}m{remaining_seconds}s" if remaining_seconds and minutes < 10 else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h" if hours else f"{days}d"
