"""Configures the log lines of the trainer's processes, which contain no secrets."""

from __future__ import annotations

import logging
import sys

from finetune_api.redaction import RedactingFormatter


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Write log lines to standard error. `process`: name of the process in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(f"%(asctime)s {process} %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
