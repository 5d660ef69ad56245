"""Named points at which a test kills the operator, as a power cut would. Without the environment variable nothing happens."""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "FINETUNE_OPERATOR_CRASH_AT"
POINTS: Final = (
    "before_job_create",
    "after_job_create",
    "after_job_delete",
    "before_status_write",
    "after_status_write",
)


def reached(point: str) -> None:
    """Die here and now if this is the point that was asked for."""
    if os.environ.get(VARIABLE) == point:
        os.kill(os.getpid(), signal.SIGKILL)
