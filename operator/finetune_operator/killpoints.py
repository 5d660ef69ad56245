"""Places at which a test may kill the operator, so that "it survives a crash here" is shown and not claimed.

Only if `FINETUNE_TEST_KILL_FILE` names a file when the process starts; then a place whose name that file holds removes
the file and ends the process as a power cut would. Without the variable a place costs one comparison.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path

VARIABLE = "FINETUNE_TEST_KILL_FILE"


class Point(StrEnum):
    """Where. Each lies between two effects that the outside can see."""

    BEFORE_STATUS_WRITE = "before_status_write"
    """The events are sent and the status that they tell of is not written."""
    AFTER_STATUS_WRITE = "after_status_write"
    BEFORE_JOB_CREATE = "before_job_create"
    AFTER_JOB_CREATE = "after_job_create"
    BEFORE_SERVICE_CREATE = "before_service_create"
    AFTER_SERVICE_CREATE = "after_service_create"
    BEFORE_JOB_DELETE = "before_job_delete"
    AFTER_JOB_DELETE = "after_job_delete"
    AFTER_POD_DELETE = "after_pod_delete"


_armed = os.environ.get(VARIABLE)


def reach(point: Point) -> None:
    """Die here, if a test asked for it."""
    if _armed is None:
        return
    file = Path(_armed)
    try:
        if file.read_text().strip() != point:
            return
        file.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
