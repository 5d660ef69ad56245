"""Formats log lines as text for people or as JSON for log collectors. Each line names the job that is being reconciled."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from finetune_api.redaction import RedactingFormatter, redact_all

from finetune_operator.settings import LogFormat, LogSettings
from finetune_operator.text import REDACTED_TEXT

current_job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")
"""`namespace/name` of the job that is being reconciled."""
current_attempt: contextvars.ContextVar[int] = contextvars.ContextVar("attempt", default=0)
"""Number of the current attempt of the job that is being reconciled, or 0 before the first attempt."""
reconcile_number: contextvars.ContextVar[int] = contextvars.ContextVar("reconcile", default=0)
"""Number of the current reconcile, counted since the process started."""


def get_context_fields() -> dict[str, Any]:
    """Return the fields that name the current job, attempt and reconcile in a log line. Empty fields are left out."""
    fields = {"job": current_job.get(), "attempt": current_attempt.get(), "reconcile": reconcile_number.get()}
    return {name: value for name, value in fields.items() if value}


class JsonFormatter(logging.Formatter):
    """Formats each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact_all(record.getMessage(), REDACTED_TEXT),
            **get_context_fields(),
        }
        if record.exc_info:
            fields["exception"] = redact_all(self.formatException(record.exc_info), REDACTED_TEXT)
        return json.dumps(fields, ensure_ascii=False)


class TextFormatter(RedactingFormatter):
    """Formats each record as time, level and message, and the fields of `get_context_fields`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        context_text = " ".join(f"{name}={value}" for name, value in get_context_fields().items())
        return f"{line} [{context_text}]" if context_text else line


def configure_logging(settings: LogSettings) -> None:
    """Set up logging for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format is LogFormat.JSON else TextFormatter())
    root_logger = logging.getLogger()
    root_logger.handlers[:] = [handler]
    root_logger.setLevel(settings.level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
