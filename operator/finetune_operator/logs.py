"""Log lines, as text for people or as JSON for collectors, each with the job it speaks of."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

from finetune_operator.settings import LogFormat, LogSettings

job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")
"""`namespace/name` of the job that is being looked at."""
attempt: contextvars.ContextVar[int] = contextvars.ContextVar("attempt", default=0)
"""Its current attempt; 0: none."""
reconcile: contextvars.ContextVar[int] = contextvars.ContextVar("reconcile", default=0)
"""Number of this look, counted from the start of the process."""


def context() -> dict[str, Any]:
    """What the current line speaks of."""
    found = {"job": job.get(), "attempt": attempt.get(), "reconcile": reconcile.get()}
    return {name: value for name, value in found.items() if value}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        value = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **context(),
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Time, level, message, then what it speaks of."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = super().format(record)
        found = " ".join(f"{name}={value}" for name, value in context().items())
        return f"{line} [{found}]" if found else line


class Patience(logging.Filter):
    """kopf says `error` of every request that it is going to repeat; the first few times that is the weather, and no error.

    So it is when its connections are gone under a request: that happens to requests in flight whenever an operator ends.
    """

    TRIES = 5
    _REPEATED = re.compile(r"Request attempt #(\d+)(?:/\d+)? failed; (?:will retry|(?:TCP|SSL) closed; will re-authenticate)")

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every line; lower the level of those."""
        found = self._REPEATED.match(record.getMessage()) if record.name.startswith("kopf") else None
        if found is not None and int(found.group(1)) <= self.TRIES:
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        return True


def configure(settings: LogSettings) -> None:
    """Set up logging of the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format is LogFormat.JSON else TextFormatter())
    handler.addFilter(Patience())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # kopf tells of every event of every object; our own lines say what came of them.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
