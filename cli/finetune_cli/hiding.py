"""Texts that are secrets by their look, wherever they stand: never shown, and never written into a FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"
)
"""Long enough that no model, column or folder is called so."""
USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
QUERY = re.compile(r"(?<=[?&])((?:[a-z]+[-_])*(?:token|key|secret|password|sig|signature)=)[^&\s'\"]+", re.IGNORECASE)


def hide(text: str, mark: str = HIDDEN) -> str:
    """The text with stars, or another mark, for what looks like a secret."""
    return QUERY.sub(rf"\1{mark}", USERINFO.sub(f"{mark}@", TOKEN.sub(mark, text)))


def looks_secret(value: Any) -> bool:
    """Whether a text looks like a secret, or a list or mapping holds such a text."""
    return any(hide(text) != text for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
