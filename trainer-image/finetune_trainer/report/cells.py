"""Formats numbers, times and texts for the cells of a table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_trainer.report.blocks import Cell
from finetune_trainer.report.redaction import redact_text
from finetune_trainer.report.scale import format_number

MAX_TEXT_LENGTH = 2000
"""How many characters of a prompt or an answer the page shows. The result files contain the whole text."""
FRACTION_METRICS = ("accuracy", "precision", "recall", "f1", "exactMatch", "letterAccuracy")


def format_metric(name: str, value: float) -> str:
    """Return the value of a metric as text."""
    return f"{value:.3f}" if name in FRACTION_METRICS else format_number(value)


def format_time(time: datetime) -> str:
    """Return a time as `2026-03-01 12:00:00`, in UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def format_hours(seconds: float) -> str:
    """Return seconds as hours with two digits after the point, or with two significant digits below 0.1 hours."""
    hours = seconds / 3600
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.2g}"


def format_seconds(seconds: float) -> str:
    """Return seconds as `4.2 s`, `3 min 20 s` or `1 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {remaining_seconds} s"


def make_size_cell(byte_count: int | None) -> Cell:
    """Return a number of bytes as a cell."""
    if byte_count is None:
        return Cell("–")
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if byte_count >= factor:
            return Cell(f"{byte_count / factor:.3g} {unit}", "number")
    return Cell(f"{byte_count} bytes", "number")


def make_number_cell(value: Any) -> Cell:
    """Return the cell of a number. Any other value becomes a text without secrets."""
    return Cell(format_number(value), "number") if isinstance(value, int | float) and not isinstance(value, bool) else Cell(redact_text(str(value)))


def shorten_text(text: str) -> str:
    """Return the first `MAX_TEXT_LENGTH` characters of a text. If the text is longer, a note at the end says how long the whole text is."""
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]} … [cut: the text has {len(text)} characters]"
