"""Makes text from users and other programs safe to show: masks secrets, removes control characters and limits the length."""

from __future__ import annotations

from functools import lru_cache

from finetune_api.redaction import redact_all

MAX_MESSAGE_CHARACTERS = 1024
"""Maximum length of a message in the status, in characters. Messages are short because all objects of a cluster share etcd's limited storage."""
REDACTED_TEXT = "[redacted]"


def clean(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Return the text with masked secrets and at most `limit` characters. All users who may read the FineTuneJob can see the result."""
    return _clean_and_cache(text[: limit * 4], limit)


@lru_cache(maxsize=512)
def _clean_and_cache(text: str, limit: int) -> str:
    """Return the result of `clean`. Results are cached, because a status repeats the same messages at each reconcile.

    `clean` cuts the text before this call, so that the cache does not hold long texts of other programs.
    """
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip()
    text = redact_all(text, REDACTED_TEXT)
    return text if len(text) <= limit else text[: limit - 4].rstrip() + " ..."


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
