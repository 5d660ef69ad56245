"""Log lines and their context fields."""

from __future__ import annotations

import json
import logging

from finetune_operator import logs
from finetune_operator.logs import JsonFormatter, TextFormatter


def make_record(message: str) -> logging.LogRecord:
    return logging.LogRecord("finetune_operator.x", logging.INFO, "file", 1, message, None, None)


def test_log_lines_name_the_job() -> None:
    token = logs.current_job.set("team/run")
    try:
        log_line = json.loads(JsonFormatter().format(make_record("created")))
        assert {name: log_line[name] for name in ("level", "message", "job")} == {
            "level": "info",
            "message": "created",
            "job": "team/run",
        }
        assert TextFormatter().format(make_record("created")).endswith("created [job=team/run]")
    finally:
        logs.current_job.reset(token)
    assert "job" not in json.loads(JsonFormatter().format(make_record("created")))
