"""Points in the code at which a test can kill the operator, to prove that the operator recovers from a crash at this point.

The points are active only if the environment variable `FINETUNE_TEST_KILL_FILE` names a file when the process starts. The file contains the name of a
point. When the process reaches this point, it removes the file and kills itself with SIGKILL. Without the variable, the operator does one comparison at
each point.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path

KILL_FILE_VARIABLE = "FINETUNE_TEST_KILL_FILE"


class KillPoint(StrEnum):
    """A point between two requests to the API server that change objects."""

    BEFORE_STATUS_WRITE = "before_status_write"
    """The events have been emitted, but the status has not been written yet."""
    AFTER_STATUS_WRITE = "after_status_write"
    BEFORE_JOB_CREATE = "before_job_create"
    AFTER_JOB_CREATE = "after_job_create"
    BEFORE_CHILD_CREATE = "before_child_create"
    """The Job exists, but one of its other objects (NetworkPolicy, Secret, Service) does not exist yet."""
    AFTER_CHILD_CREATE = "after_child_create"
    BEFORE_JOB_DELETE = "before_job_delete"
    AFTER_JOB_DELETE = "after_job_delete"
    AFTER_POD_DELETE = "after_pod_delete"


_kill_file_path = os.environ.get(KILL_FILE_VARIABLE)


def kill_if_requested(point: KillPoint) -> None:
    """Kill the process if the file with the kill point names this point."""
    if _kill_file_path is None:
        return
    file = Path(_kill_file_path)
    try:
        if file.read_text().strip() != point:
            return
        file.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
